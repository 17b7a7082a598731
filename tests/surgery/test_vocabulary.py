"""Fewer tokens: the model's laws on many architectures, tokenizers of every kind, tasks, runs and mistakes."""

from __future__ import annotations

import copy
import json
import random
import re
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import AutoModelForSequenceClassification, AutoTokenizer, GenerationConfig, Trainer, TrainingArguments
from typer.testing import CliRunner

import hfcompress.run.loop as loop
from hfcompress import CompressionCallback, CompressionError, Distill, PruneVocab, Recipe, compress, riding
from hfcompress.calibration.batches import Batches
from hfcompress.checkpoint.artifact import save
from hfcompress.checkpoint.describe import describe, diff
from hfcompress.methods import Adapters, LowRank, Quantize
from hfcompress.run.cli import app
from hfcompress.run.recipe import task_from
from hfcompress.surgery.modules import copied
from hfcompress.surgery.vocabulary.embeddings import fixed_tokens, keep_tokens, named_tokens, vocabulary_size
from hfcompress.surgery.vocabulary.tokenizer import Vocabulary, check_same, counted, encoded, tokenizer_of
from tests import fresh
from tests.surgery.tokenizers_of import MADE, OTHERS, TEXTS, tokenizer
from tests.tiny import (
    FILLER,
    TOPICS,
    WORDS,
    tiny_checkpoint,
    tiny_image_processor,
    tiny_images,
    tiny_model,
    tiny_texts,
    tiny_tokenizer,
)

# ---------------------------------------------------------------- the model

TOTAL = 160
SIZES = {
    "vocab_size": TOTAL,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 40,
}
IDS = {"bos_token_id": 7, "eos_token_id": 40, "pad_token_id": 90}
GROUPED = {**SIZES, **IDS, "num_key_value_heads": 2}
HEADS = {**GROUPED, "head_dim": 8}
ENCODER = {**SIZES, "pad_token_id": 5}
POSITIONS = {**SIZES, "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2}  # counted from the pad token
GPT2 = {"vocab_size": TOTAL, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 40, **IDS}
T5 = {
    "vocab_size": TOTAL,
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 48,
    "num_layers": 2,
    "num_heads": 4,
    "decoder_start_token_id": 90,
    **IDS,
}
BART = {
    "vocab_size": TOTAL,
    "d_model": 32,
    **{
        f"{side}_{name}": n
        for side in ("encoder", "decoder")
        for name, n in (("layers", 2), ("attention_heads", 4), ("ffn_dim", 48))
    },
    "max_position_embeddings": 40,
    "decoder_start_token_id": 40,
    "forced_eos_token_id": 40,
    **IDS,
}
WHISPER = {
    **{key: value for key, value in BART.items() if not key.startswith(("max_pos", "forced"))},
    "max_source_positions": 30,
}
WHISPER |= {"max_target_positions": 40, "num_mel_bins": 8, "suppress_tokens": [3, 7, 150], "begin_suppress_tokens": [3, 40]}
GEMMA3N = {**HEADS, "vocab_size_per_layer_input": 150, "hidden_size_per_layer_input": 8, "num_kv_shared_layers": 0}
GEMMA3N |= {
    "layer_types": ["sliding_attention", "full_attention"],
    "laurel_rank": 4,
    "altup_num_inputs": 2,
    "intermediate_size": [48] * 2,
}
GEMMA3N |= {"activation_sparsity_pattern": [0.0] * 2}
CLIP_TEXT = {**SIZES, "projection_dim": 32, **IDS}
ZOO: dict[str, tuple[str, str, dict[str, Any]]] = {
    "bert": ("BertForSequenceClassification", "BertConfig", ENCODER),
    "bert-mlm": ("BertForMaskedLM", "BertConfig", ENCODER),
    "bert-qa": ("BertForQuestionAnswering", "BertConfig", ENCODER),
    "roberta": ("RobertaForMaskedLM", "RobertaConfig", POSITIONS),
    "xlm-r": ("XLMRobertaForTokenClassification", "XLMRobertaConfig", POSITIONS),
    "mpnet": ("MPNetForMaskedLM", "MPNetConfig", POSITIONS),
    "deberta-v2": ("DebertaV2ForMaskedLM", "DebertaV2Config", {**ENCODER, "relative_attention": True, "pos_att_type": ["p2c"]}),
    "modernbert": ("ModernBertForMaskedLM", "ModernBertConfig", {**ENCODER, **{f"{k}_token_id": 30 for k in ("cls", "sep", "bos", "eos")}}),
    "electra": ("ElectraForMaskedLM", "ElectraConfig", {**ENCODER, "embedding_size": 16}),
    "electra-small": ("ElectraForPreTraining", "ElectraConfig", {**ENCODER, "embedding_size": 16}),
    "distilbert": (
        "DistilBertForMaskedLM",
        "DistilBertConfig",
        {"vocab_size": TOTAL, "dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 48, "pad_token_id": 5},
    ),
    "albert": ("AlbertForMaskedLM", "AlbertConfig", {**ENCODER, "embedding_size": 16}),
    "xlm": (
        "XLMWithLMHeadModel",
        "XLMConfig",
        {"vocab_size": TOTAL, "emb_dim": 32, "n_layers": 2, "n_heads": 4, "pad_index": 0, "use_lang_emb": False},
    ),
    "gpt2": ("GPT2LMHeadModel", "GPT2Config", GPT2),
    "gpt2-tags": ("GPT2ForTokenClassification", "GPT2Config", GPT2),
    "gpt-neox": ("GPTNeoXForCausalLM", "GPTNeoXConfig", {**SIZES, **IDS}),
    "opt": ("OPTForCausalLM", "OPTConfig", {**SIZES, **IDS, "ffn_dim": 48, "word_embed_proj_dim": 16}),
    "llama": ("LlamaForCausalLM", "LlamaConfig", GROUPED),
    "llama-tied": ("LlamaForCausalLM", "LlamaConfig", {**GROUPED, "tie_word_embeddings": True}),
    "llama-labels": ("LlamaForSequenceClassification", "LlamaConfig", GROUPED),
    "mistral": ("MistralForCausalLM", "MistralConfig", HEADS),
    "qwen2": ("Qwen2ForCausalLM", "Qwen2Config", GROUPED),
    "qwen3": ("Qwen3ForCausalLM", "Qwen3Config", HEADS),
    "gemma2": ("Gemma2ForCausalLM", "Gemma2Config", HEADS),
    "gemma3": ("Gemma3ForCausalLM", "Gemma3TextConfig", HEADS),
    "gemma3n": ("Gemma3nForCausalLM", "Gemma3nTextConfig", GEMMA3N),
    "phi3": ("Phi3ForCausalLM", "Phi3Config", GROUPED),
    "mixtral": ("MixtralForCausalLM", "MixtralConfig", {**GROUPED, "num_local_experts": 2}),
    "t5": ("T5ForConditionalGeneration", "T5Config", T5),
    "t5-untied": ("T5ForConditionalGeneration", "T5Config", {**T5, "tie_word_embeddings": False}),
    "bart": ("BartForConditionalGeneration", "BartConfig", BART),
    "marian": ("MarianMTModel", "MarianConfig", BART),
    "marian-untied": ("MarianMTModel", "MarianConfig", {**BART, "share_encoder_decoder_embeddings": False, "decoder_vocab_size": TOTAL}),
    "m2m-100": ("M2M100ForConditionalGeneration", "M2M100Config", {**BART, "pad_token_id": 1}),
    "whisper": ("WhisperForConditionalGeneration", "WhisperConfig", WHISPER),
    "clip-text": ("CLIPTextModel", "CLIPTextConfig", CLIP_TEXT),
    "clip": ("CLIPModel", "CLIPConfig", {"text_config": CLIP_TEXT, "vision_config": {**SIZES, "image_size": 16, "patch_size": 8}}),
}  # fmt: skip


def made(kind: str, seed: int = 0, **more: Any) -> Any:
    name, config, sizes = ZOO[kind]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = getattr(transformers, name)(getattr(transformers, config)(**{**copy.deepcopy(sizes), **more}))
        with torch.no_grad():  # fresh biases are zero, which would hide mistakes
            for tensor in [*model.parameters(), *(one for name, one in model.named_buffers() if name == "final_logits_bias")]:
                if tensor.dim() and (tensor.dim() == 1 or tensor.shape[0] == 1):
                    tensor.add_(torch.randn_like(tensor) * 0.1)
    return model.eval()


def some(model: Any, seed: int = 0) -> list[int]:
    must = named_tokens(model) | set(range(fixed_tokens(model)))
    return sorted(must | set(random.Random(seed).sample(range(vocabulary_size(model)), 60)))


def plain(model: Any, keep: list[int]) -> list[int]:
    """Places of kept tokens that no config names."""
    must = named_tokens(model) | set(range(fixed_tokens(model)))
    return [place for place, token in enumerate(keep) if token not in must]


def answers(model: Any, ids: torch.Tensor) -> torch.Tensor:
    batch: dict[str, Any] = {"input_ids": ids}
    if model.main_input_name == "input_features":
        generator = torch.Generator().manual_seed(0)
        batch = {"input_features": torch.randn(len(ids), 8, 60, generator=generator), "decoder_input_ids": ids}
    elif model.config.is_encoder_decoder:
        batch["decoder_input_ids"] = ids[:, :5]
    if type(model).__name__ == "CLIPModel":
        batch["pixel_values"] = torch.zeros(1, 3, 16, 16)
    with torch.no_grad():
        found = model(**batch)
    for name in ("logits", "start_logits", "logits_per_text", "last_hidden_state"):
        if getattr(found, name, None) is not None:
            return getattr(found, name)
    return found[0]


@pytest.mark.parametrize("kind", ZOO)
def test_kept_tokens_are_read_and_written_as_before(kind: str, tmp_path: Path) -> None:
    model, whole = made(kind), made(kind)
    keep = some(model)
    places = plain(model, keep)
    ids = torch.tensor([random.Random(1).choices(places, k=10) for _ in range(1 if "labels" in kind else 2)])
    before = answers(whole, torch.tensor(keep)[ids])
    tied = whole.get_input_embeddings() if kind != "clip" else None
    keep_tokens(model, keep)
    after = answers(model, ids)
    if before.shape[-1] == TOTAL:
        before = before[..., keep]
    torch.testing.assert_close(after, before, atol=1e-5, rtol=1e-5)
    assert vocabulary_size(model) == len(keep)
    if tied is not None and whole.get_output_embeddings() is not None:
        was_tied = whole.get_output_embeddings().weight is tied.weight
        assert (model.get_output_embeddings().weight is model.get_input_embeddings().weight) == was_tied
    if describe(model) == {}:  # all of them
        model.save_pretrained(tmp_path)
        again = type(model).from_pretrained(tmp_path).eval()
        held = model.state_dict()
        assert all(torch.equal(held[name], tensor) for name, tensor in again.state_dict().items())
        # the same weights at another address: kernels may add in another order
        torch.testing.assert_close(answers(again, ids), after, atol=1e-6, rtol=1e-6)
        assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())
    else:
        pytest.fail(f"{diff(model)}")


@pytest.mark.parametrize("kind", ["gpt2", "llama-tied", "qwen3", "gemma3", "t5", "bart", "marian", "whisper", "gpt-neox"])
def test_generating_goes_on(kind: str, tmp_path: Path) -> None:
    model, whole = made(kind), made(kind)
    keep = some(model)
    place = {old: new for new, old in enumerate(keep)}
    for one in (whole, model):
        one.generation_config.update(max_new_tokens=6, do_sample=False, suppress_tokens=None, begin_suppress_tokens=None)
    gone = sorted(set(range(TOTAL)) - set(keep))
    keep_tokens(model, keep)
    assert model.generation_config.eos_token_id == model.config.eos_token_id == place[40]
    if kind == "whisper":
        given = {"input_features": torch.randn(1, 8, 60, generator=torch.Generator().manual_seed(0))}
        mine, theirs = dict(given), dict(given)
    else:
        ids = torch.tensor([[place[token] for token in keep if token not in (7, 40, 90)][:6]])
        mine, theirs = {"input_ids": ids}, {"input_ids": torch.tensor(keep)[ids]}
    found = model.generate(**mine)
    # what is gone can't be written: the whole model, forbidden to, writes the same
    expected = whole.generate(**theirs, suppress_tokens=gone)
    assert torch.equal(torch.tensor(keep)[found], expected)


def test_every_token_a_config_names_is_renumbered() -> None:
    model = made("whisper")
    keep = some(model)
    place = {old: new for new, old in enumerate(keep)}
    model.generation_config = GenerationConfig(
        eos_token_id=[40, 90],
        forced_decoder_ids=[[1, 7], [2, 40]],
        suppress_tokens=[7, next(token for token in range(TOTAL) if token not in keep), -1],
        bad_words_ids=[[7, 40], [next(token for token in range(TOTAL) if token not in keep)]],
        sequence_bias={(7, 40): 1.5},
        no_repeat_ngram_size=3,
        max_new_tokens=7,
    )
    model.generation_config.lang_to_id = {"<|en|>": 90}
    keep_tokens(model, keep)
    told = model.generation_config
    assert told.eos_token_id == [place[40], place[90]]
    assert told.forced_decoder_ids == [[1, place[7]], [2, place[40]]]
    assert told.suppress_tokens == [place[7], -1]
    assert told.bad_words_ids == [[place[7], place[40]]]
    assert told.sequence_bias == {(place[7], place[40]): 1.5}
    assert told.lang_to_id == {"<|en|>": place[90]}
    assert (told.no_repeat_ngram_size, told.max_new_tokens) == (3, 7), "no tokens"
    assert model.config.begin_suppress_tokens == [place[token] for token in (3, 40) if token in place]
    assert model.config.decoder_start_token_id == place[40]


def test_padding_rows_follow() -> None:
    model = made("bert")
    keep_tokens(model, [2, 5, 9])
    assert model.bert.embeddings.word_embeddings.padding_idx == model.config.pad_token_id == 1


def test_tables_of_the_layers_hold_the_tokens_they_held() -> None:
    model = made("gemma3n")
    keep = sorted({*some(model), 149, 150, 159})
    keep_tokens(model, keep)
    assert model.config.vocab_size_per_layer_input == sum(token < 150 for token in keep)


def test_twice_is_once() -> None:
    model, other = made("t5"), made("t5")
    keep = some(model)
    inner = [place for place, token in enumerate(keep) if token in named_tokens(other) or token % 2]
    keep_tokens(model, keep)
    keep_tokens(model, inner)
    keep_tokens(other, [keep[place] for place in inner])
    assert model.kept_tokens == other.kept_tokens
    assert all(torch.equal(one, two) for one, two in zip(model.state_dict().values(), other.state_dict().values(), strict=True))


def test_a_factored_table_is_cut_too(tmp_path: Path) -> None:
    model = tiny_model("bert")
    LowRank(rank=4, target_modules=["word_embeddings"]).run(model, None)
    before = model(torch.tensor([[5, 7, 9]])).logits
    keep_tokens(model, [0, 5, 7, 9])
    torch.testing.assert_close(model(torch.tensor([[1, 2, 3]])).logits, before, atol=1e-6, rtol=1e-5)
    save(model, None, tmp_path)
    # Out of the mapped file: where a tensor's place is not aligned, a kernel may sum in another order.
    again = copy.deepcopy(AutoModelForSequenceClassification.from_pretrained(tmp_path))
    assert torch.equal(again(torch.tensor([[1, 2, 3]])).logits, model(torch.tensor([[1, 2, 3]])).logits)


def test_models_whose_tokens_are_no_rows_are_refused() -> None:
    from transformers import (
        CanineConfig,
        CanineModel,
        FSMTConfig,
        FSMTForConditionalGeneration,
        ViTConfig,
        ViTModel,
        Wav2Vec2Config,
        Wav2Vec2ForCTC,
    )

    small = {key: SIZES[key] for key in list(SIZES)[1:]}
    speech = {**small, "conv_dim": (16, 16), "conv_stride": (5, 2), "conv_kernel": (10, 3), "num_feat_extract_layers": 2}
    for model in (
        CanineModel(CanineConfig(**small, num_hash_buckets=16)),
        ViTModel(ViTConfig(**small)),
        Wav2Vec2ForCTC(Wav2Vec2Config(**speech, num_conv_pos_embeddings=16, num_conv_pos_embedding_groups=2)),
    ):
        before = {name: tensor.shape for name, tensor in model.state_dict().items()}
        with pytest.raises(CompressionError, match=f"{type(model).__name__} has no table with a row for each token"):
            keep_tokens(model, [0, 1])
        assert {name: tensor.shape for name, tensor in model.state_dict().items()} == before
    two = FSMTForConditionalGeneration(
        FSMTConfig(langs=["en", "de"], src_vocab_size=60, tgt_vocab_size=70, d_model=32, encoder_layers=1, decoder_layers=1)
    )
    with pytest.raises(
        CompressionError, match="has two vocabularies, of 60 and of 70 tokens, and one tokenizer can't tell both"
    ):
        keep_tokens(two, [0, 1, 2, 3])


def test_what_keep_tokens_refuses() -> None:
    def refused(model: Any, keep: list[int]) -> str:
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        with pytest.raises(CompressionError) as error:
            keep_tokens(model, keep)
        assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items()), "no change"
        return str(error.value)

    assert "must ascend without repeats, from 0 to 159" in refused(made("llama"), [3, 2])
    assert "must ascend without repeats, from 0 to 159" in refused(made("llama"), [3, 160])
    assert "eos_token_id names token 40, which would go; keep it" in refused(made("llama"), [7, 90, 91])
    assert "reads meaning off the place of token 1" in refused(made("roberta"), [1, 2, 3, 4])
    coded = tiny_model("bert")
    coded.bert.embeddings.word_embeddings = torch.nn.Embedding(150, 64)
    assert "no field of BertConfig tells the 150 tokens" in refused(coded, [0, 1])
    head = made("llama")
    head.lm_head = torch.nn.Linear(32, 100)
    assert "lm_head.weight is a Linear of another shape than the config tells" in refused(head, [7, 40, 90])


# ---------------------------------------------------------------- tokenizers


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: Any) -> dict[str, Any]:
    return {kind: tokenizer(kind, tmp_path_factory.mktemp(kind)) for kind in MADE}


def cut(old: Any, texts: list[str], most: int | None = None) -> Any:
    vocabulary = Vocabulary(old)
    names = {index: token for token, index in old.get_vocab().items()}
    keep = vocabulary.needed()
    for index, _ in counted(old, texts).most_common(most):
        keep |= vocabulary.closed(index, names[index])
    return vocabulary.smaller(sorted(keep))


def tokens(one: Any, texts: list[str]) -> list[list[str]]:
    return [encoding.tokens for _, encoding in encoded(one, texts)]


@pytest.mark.parametrize("kind", MADE)
def test_texts_of_the_corpus_are_cut_into_the_same_tokens(kind: str, tokenizers: dict[str, Any], tmp_path: Path) -> None:
    old = tokenizers[kind]
    new = cut(old, TEXTS)
    assert len(new) < len(old)
    assert tokens(new, TEXTS) == tokens(old, TEXTS)
    assert new.decode(new(TEXTS[0])["input_ids"]) == old.decode(old(TEXTS[0])["input_ids"])
    # other texts are still read: without a token for the unknown where there was none
    unknown = old.unk_token if kind != "clip" else None  # CLIP's stands at the end of every text
    for was, now in zip(tokens(old, OTHERS), tokens(new, OTHERS), strict=True):
        assert kind == "word_level" or (unknown in now) <= (unknown in was)
    new.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert type(again) is type(old) and again.get_vocab() == new.get_vocab()
    assert [again(text)["input_ids"] for text in (*TEXTS, *OTHERS)] == [new(text)["input_ids"] for text in (*TEXTS, *OTHERS)]
    assert sorted(new.get_vocab().values()) == list(range(len(new))), "counted from 0"


@pytest.mark.parametrize("kind", MADE)
def test_all_that_belongs_to_a_tokenizer_stays(kind: str, tokenizers: dict[str, Any]) -> None:
    old = tokenizers[kind]
    new = cut(old, TEXTS[:2])
    for name in (
        "special_tokens_map",
        "padding_side",
        "truncation_side",
        "model_max_length",
        "chat_template",
        "model_input_names",
    ):
        assert getattr(new, name) == getattr(old, name), name
    assert [token for _, token in sorted(new.added_tokens_decoder.items())] == [
        token for _, token in sorted(old.added_tokens_decoder.items())
    ]
    assert type(new) is type(old)
    pair = (TEXTS[0], TEXTS[1])
    assert new.convert_ids_to_tokens(new(*pair)["input_ids"]) == old.convert_ids_to_tokens(old(*pair)["input_ids"])
    for token in old.all_special_tokens:
        assert new.convert_ids_to_tokens(new.convert_tokens_to_ids(token)) == token
    assert new.init_kwargs.keys() == old.init_kwargs.keys()
    for index, token in new.init_kwargs.get("added_tokens_decoder", {}).items():
        assert new.get_vocab()[str(token)] == index


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("kind", MADE)
def test_whatever_stays_is_cut_as_before(kind: str, seed: int, tokenizers: dict[str, Any]) -> None:
    """The property: choose any tokens; each text all of whose tokens are among them is cut into just these."""
    old, rng = tokenizers[kind], random.Random(seed)
    words = [word for text in (*TEXTS, *OTHERS) for word in text.split()]
    texts = [" ".join(rng.choices(words, k=rng.randint(1, 4))) for _ in range(300)]
    new = cut(old, rng.sample(texts, 40), most=rng.choice([None, 60, 120]))
    stays, checked = new.get_vocab(), 0
    for was, now in zip(tokens(old, texts), tokens(new, texts), strict=True):
        if all(token in stays for token in was):
            assert now == was
            checked += 1
    assert checked >= 20


@pytest.mark.parametrize("kind", ["roberta", "gpt2", "llama3"])
def test_bytes_spell_everything(kind: str, tokenizers: dict[str, Any]) -> None:
    new = cut(tokenizers[kind], TEXTS[:1])
    text = "Grüße, 世界 🙂 \x07 Ω"
    assert new.decode(new(text, add_special_tokens=False)["input_ids"]) == text


def test_byte_fallback_spells_everything(tokenizers: dict[str, Any]) -> None:
    for kind in ("llama", "gemma"):
        new = cut(tokenizers[kind], TEXTS[:1])
        assert "Grüße, 世界 🙂" in new.decode(new("Grüße, 世界 🙂", add_special_tokens=False)["input_ids"])


def test_without_what_a_token_is_merged_from_it_would_be_lost(tokenizers: dict[str, Any]) -> None:
    """The closure is needed: this is what the check is for."""
    old = tokenizers["roberta"]
    vocabulary = Vocabulary(old)
    keep = sorted(vocabulary.needed() | set(counted(old, TEXTS)))
    with pytest.raises(CompressionError, match=r"the smaller tokenizer cuts '.*' into other tokens"):
        check_same(old, vocabulary.smaller(keep), TEXTS)


def test_an_unknown_character_weighs_what_it_did(tokenizers: dict[str, Any]) -> None:
    old = tokenizers["t5"]
    texts = [f"{word}☃{word}" for text in OTHERS for word in text.split()[:3]]
    new = cut(old, texts)
    assert tokens(new, texts) == tokens(old, texts)


class Slow:
    """A tokenizer written in Python."""

    def get_vocab(self) -> dict[str, int]:
        return {"a": 0}


def test_tokenizers_that_cannot_be_cut_are_refused() -> None:
    with pytest.raises(CompressionError, match=r"Slow is written in Python, .* possible are fast tokenizers"):
        tokenizer_of(Slow())
    with pytest.raises(CompressionError, match="a ViTImageProcessorPil has no tokenizer, and tokens can't be chosen"):
        tokenizer_of(tiny_image_processor())
    with pytest.raises(CompressionError, match="there is no tokenizer, and tokens can't be chosen"):
        tokenizer_of(None)


# ---------------------------------------------------------------- the method


def test_one_line_in_a_script_changes_both_in_place(tmp_path: Path) -> None:
    model, words = tiny_model("bert", vocab_size=60), tiny_tokenizer()
    texts = ["the cat and the dog", "a bird was in the bank"]
    held = copied(model)
    before = held(**words(texts, padding=True, return_tensors="pt")).logits
    collator = transformers.DataCollatorWithPadding(words)
    PruneVocab(texts).run(model, words)
    assert len(words) == model.config.vocab_size == 5 + 9
    torch.testing.assert_close(model(**words(texts, padding=True, return_tensors="pt")).logits, before)
    assert collator.tokenizer is words, "whoever holds it goes on with the new one"
    model.save_pretrained(tmp_path)
    words.save_pretrained(tmp_path)
    told = transformers.pipeline("text-classification", model=str(tmp_path), tokenizer=str(tmp_path))(texts[0])
    assert told[0]["score"] == pytest.approx(before[0].softmax(-1).max().item(), abs=1e-5)


def test_a_processor_around_a_tokenizer_will_do() -> None:
    class Processor:
        def __init__(self) -> None:
            self.tokenizer = tiny_tokenizer()
            self.image_token_id = self.tokenizer.convert_tokens_to_ids("bank")

    model, processor = tiny_model("bert"), Processor()
    PruneVocab(["cat bank"]).run(model, Batches(processor=processor))
    assert processor.image_token_id == processor.tokenizer.convert_tokens_to_ids("bank")
    assert model.config.vocab_size == len(processor.tokenizer) == 7


@pytest.mark.parametrize(("fields", "size"), [({"tokens": 8}, 8), ({"keep": 0.25}, 9), ({"min_count": 2}, 6), ({}, 9)])
def test_budgets_keep_the_most_frequent(fields: dict[str, Any], size: int) -> None:
    words = tiny_tokenizer(WORDS[:31])
    model = tiny_model("bert", vocab_size=36)
    PruneVocab(["the the the of and a", "the"], **fields).run(model, words)
    assert len(words) == size
    assert "the" in words.get_vocab()


def test_always_and_the_tokens_of_configs_stay() -> None:
    words, model = tiny_tokenizer(), tiny_model("llama", vocab_size=60)
    model.config.image_token_id = words.convert_tokens_to_ids("goal")
    PruneVocab(["the cat"], always=["stock"]).run(model, words)
    assert {"the", "cat", "goal", "stock"} == set(words.get_vocab()) - set(words.all_special_tokens)
    assert model.config.image_token_id == words.convert_tokens_to_ids("goal")


def test_a_second_time_goes_on() -> None:
    words, model = tiny_tokenizer(), tiny_model("bert", vocab_size=60)
    PruneVocab(["the cat and a dog"]).run(model, words)
    PruneVocab(["the cat"]).run(model, words)
    assert len(words) == model.config.vocab_size == 7
    with pytest.raises(CompressionError, match="the texts use all 7 tokens, or these must stay, and nothing would be cut"):
        PruneVocab(["the cat"]).run(model, words)


@pytest.mark.parametrize(
    ("corpus", "expected"),
    [("texts.txt", {"the", "cat"}), ("rows.jsonl", {"the", "dog", "bank"}), ("folder", {"cat", "goal"})],
)
def test_a_corpus_is_named_as_tasks_name_data(corpus: str, expected: set[str], tmp_path: Path) -> None:
    (tmp_path / "texts.txt").write_text("the cat\n\nthe")
    (tmp_path / "rows.jsonl").write_text('{"text": "the dog", "words": ["bank"]}\n')
    for split, word in (("train", "cat"), ("test", "goal")):
        (tmp_path / "folder" / split / "label").mkdir(parents=True)
        (tmp_path / "folder" / split / "label" / "0.txt").write_text(word)
    words, model = tiny_tokenizer(), tiny_model("bert", vocab_size=60)
    PruneVocab(str(tmp_path / corpus)).run(model, words)
    assert set(words.get_vocab()) - set(words.all_special_tokens) == expected


def refusal(method: PruneVocab, model: Any, task: Any) -> str:
    with pytest.raises(CompressionError) as error:
        method.run(model, task)
    return str(error.value)


def test_mistakes_get_their_sentence() -> None:
    words = tiny_tokenizer()
    model = tiny_model("bert", vocab_size=60)
    size = len(words)
    assert "always: 'katze' is no token of the tokenizer" in refusal(PruneVocab(["the"], always=["katze"]), model, words)
    assert "there is no corpus to choose tokens by; give one" in refusal(PruneVocab(), model, words)
    assert "at most 3 tokens are to stay, and 5 must" in refusal(PruneVocab(["the"], tokens=3), model, words)
    assert "nothing would be cut" in refusal(PruneVocab([" ".join(WORDS)]), tiny_model("bert", vocab_size=size), words)
    assert f"the tokenizer has {size} tokens and the model 30" in refusal(
        PruneVocab(["a"]), tiny_model("bert", vocab_size=30), words
    )
    assert "there is no tokenizer" in refusal(PruneVocab(["the"]), model, Batches())
    assert "Slow is written in Python" in refusal(PruneVocab(["the"]), model, Slow())
    assert "has no table with a row for each token" in refusal(PruneVocab(["the"]), tiny_model("vit"), words)
    assert len(words) == size and model.config.vocab_size == 60, "a mistake changes nothing"
    with riding(model, [Adapters(r=2, merge=False)], None):
        pass
    assert "the model carries an adapter; merge it first" in refusal(PruneVocab(["the"]), model, words)
    coded = tiny_model("llama", vocab_size=64, tie_word_embeddings=False)
    coded.lm_head = Quantize(8).quantized(coded.lm_head)
    assert "list prune_vocab before quantize" in refusal(PruneVocab(["the"]), coded, words)


def test_wrong_fields_are_told_by_the_recipe() -> None:
    def mistakes(*steps: Any) -> str:
        with pytest.raises(CompressionError) as error:
            Recipe.from_dict({"model": "m", "task": {"name": "text-classification", "dataset": "d"}, "steps": list(steps)})
        return str(error.value)

    assert "tokens and keep both say how many tokens stay" in mistakes({"prune_vocab": {"tokens": 9, "keep": 0.5}})
    assert "split chooses among the task's own data" in mistakes({"prune_vocab": {"corpus": "texts.txt", "split": "all"}})
    assert "corpus has no text" in mistakes({"prune_vocab": {"corpus": [" "]}})
    assert "prune_vocab: it can't ride along with training" in mistakes({"train": {"with": ["prune_vocab"]}})
    kept = {"train": {"with": [{"adapters": {"merge": False}}]}}
    assert "the adapter of steps.0 is kept, and only cast may follow it" in mistakes(kept, "prune_vocab")


def test_it_does_not_ride_along(tmp_path: Path) -> None:
    model, words = tiny_model("bert", vocab_size=60), tiny_tokenizer()
    with (
        pytest.raises(CompressionError, match="prune_vocab: it can't ride along with training"),
        riding(model, [PruneVocab(["the"])], Batches(processor=words)),
    ):
        pass
    rows = [{**words("the cat"), "labels": 0}] * 2
    args = TrainingArguments(output_dir=str(tmp_path), report_to="none", use_cpu=True, max_steps=1)
    with pytest.raises(CompressionError, match=r"call run\(model, tokenizer\) before you tokenise"):
        Trainer(model, args, train_dataset=rows, callbacks=[CompressionCallback(PruneVocab(["the"]))]).train()  # type: ignore[arg-type]


def test_a_teacher_with_other_tokens_is_refused_unless_it_is_cut_too() -> None:
    model, teacher, words = tiny_model("bert", vocab_size=60), tiny_model("bert", vocab_size=60, seed=1), tiny_tokenizer()
    PruneVocab(["the cat and the dog"]).run(model, words)
    batch = {**words(["the cat", "the dog"], return_tensors="pt"), "labels": torch.tensor([0, 1])}
    with (
        pytest.raises(CompressionError, match="prune_vocab left the student 9 tokens, under other ids than the teacher's 60"),
        riding(model, [Distill(teacher)], [batch]),
    ):
        pass
    keep_tokens(teacher, model.kept_tokens)
    with riding(model, [Distill(teacher)], [batch]):
        model.train()(**batch).loss.backward()


# ---------------------------------------------------------------- in a recipe


@pytest.fixture(scope="module")
def place(tmp_path_factory: Any) -> Path:
    """Models whose vocabularies have words that no text has; texts, pairs and tags."""
    folder = tmp_path_factory.mktemp("place")
    tiny_texts(folder / "texts")
    spare = tiny_tokenizer([*(f"unused{number}" for number in range(40)), *WORDS, *(f"spare{number}" for number in range(40))])
    for kind, task in (("bert", None), ("bert", "masked-lm"), ("bert", "token-classification"), ("llama", None), ("t5", None)):
        path = folder / (f"{kind}-{task}" if task else kind)
        tiny_model(kind, task, vocab_size=140).save_pretrained(path)
        spare.save_pretrained(path)
    rows = [{"document": f"the {word} of a cat", "summary": f"a {word}"} for word in WORDS]
    (folder / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    tags = [
        {"tokens": ["the", word, "of"], "ner_tags": ["O", "LABEL_1" if word in FILLER else "LABEL_2", "O"]} for word in WORDS
    ]
    tags = [{**row, "ner_tags": ["LABEL_0" if tag == "O" else tag for tag in row["ner_tags"]]} for row in tags]  # type: ignore[attr-defined]
    (folder / "tags.jsonl").write_text("\n".join(map(json.dumps, tags)))
    return folder


TASKS = {
    "text-classification": ("bert", "texts", {"max_length": 32}),
    "token-classification": ("bert-token-classification", "tags.jsonl", {}),
    "causal-lm": ("llama", "texts", {"block_size": 32}),
    "masked-lm": ("bert-masked-lm", "texts", {"max_length": 32}),
    "seq2seq-lm": ("t5", "pairs.jsonl", {}),
}


@pytest.fixture()
def unproven(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a fresh process and a picture of a run, which take their time; other tests have them."""
    monkeypatch.setattr(loop, "prove", lambda *given: 0.0)
    monkeypatch.setattr(loop, "plot", lambda *given: None)


def recipe(place: Path, name: str = "text-classification", *steps: Any, **task: Any) -> Recipe:
    kind, data, fields = TASKS[name]
    raw = {"model": str(place / kind), "task": {"name": name, "dataset": str(place / data), **fields, **task}}
    return Recipe.from_dict({**raw, "steps": list(steps or ["prune_vocab"])})


@pytest.mark.parametrize("name", TASKS)
def test_a_task_goes_on_with_the_smaller_tokenizer(name: str, place: Path) -> None:
    chosen = recipe(place, name)
    task = chosen.task.open(chosen.model)
    model = task.load_model(chosen.model)
    first = task.remember(model)
    rows = {split: [task.processor.convert_ids_to_tokens(row["input_ids"]) for row in data]
            for split, data in (("train", task.train_dataset), ("eval", task.eval_dataset))}  # fmt: skip
    corpus = str(place / TASKS[name][1])  # with the texts to score on
    PruneVocab(corpus).run(model, task)
    assert len(task.processor) == model.config.vocab_size < 90
    assert [task.processor.convert_ids_to_tokens(row["input_ids"]) for row in task.train_dataset] == rows["train"]
    then = task.score(model)
    if name != "masked-lm":  # some masks are words drawn by chance from all there are
        assert [task.processor.convert_ids_to_tokens(row["input_ids"]) for row in task.eval_dataset] == rows["eval"]
    if name in ("text-classification", "token-classification"):
        assert then == {**first, "agreement": 1.0}
    elif name == "masked-lm":
        assert "agreement" not in then, "other questions"
        assert "texts cut into other tokens" in task.notes[0]
    else:
        # a word that is gone can't be foretold: the rest of the answers are the same
        assert 0.2 < then["agreement"] <= 1 and then["perplexity"] < first["perplexity"]
        assert task.notes == (
            f"scored over {len(task.processor)} tokens, so compare perplexity with rows of the same tokens only",
        )
    batch = next(task.batches(model, 4))
    assert int(batch["input_ids"].max()) < model.config.vocab_size
    model(**batch)
    model(**task.example(2, 8))


def test_an_answer_in_tokens_is_compared_by_what_it_says(place: Path) -> None:
    chosen = recipe(place, "causal-lm")
    task = chosen.task.open(chosen.model)
    model = task.load_model(chosen.model)
    task.remember(model)
    whole, columns = copied(model), task.predict(model)
    PruneVocab(str(place / "texts")).run(model, task)
    now = task.predict(model)
    assert (now["references"] == columns["references"]).all(), "in the tokens the task was opened with"
    kept = set(model.kept_tokens)
    same = [was == is_ for was, is_ in zip(columns["predictions"], now["predictions"], strict=True) if was in kept]
    assert same and all(same), "where the whole model foretold a token that stays, so does the smaller one"
    assert task.original is None and whole is not None


def test_answers_to_other_questions_are_not_compared(place: Path, tmp_path: Path) -> None:
    chosen = recipe(place, "causal-lm")
    task = chosen.task.open(chosen.model)
    model = task.load_model(chosen.model)
    assert task.remember(model)["agreement"] == 1
    PruneVocab(["the cat of"]).run(model, task)
    assert "agreement" not in task.score(model)
    blind = recipe(place, "token-classification", labelled=False, max_length=8)
    task = blind.task.open(blind.model)
    model = task.load_model(blind.model)
    task.remember(model)
    with pytest.raises(CompressionError, match="an answer to each token can't be compared with the original's; give a corpus"):
        PruneVocab(["the cat of"]).run(model, task)


@pytest.mark.parametrize("name", TASKS)
def test_the_original_teaches_what_has_fewer_tokens(name: str, place: Path, tmp_path: Path, unproven: None) -> None:
    teaching = {
        "train": {"epochs": 1, "max_steps": 2, "bf16": False, "learning_rate": 1e-9, "with": [{"distill": {"alpha": 1.0}}]}
    }
    chosen = recipe(place, name, "prune_vocab", teaching)
    report = compress(chosen, tmp_path / "out")
    assert report.rows[1].parameters == report.rows[2].parameters < report.rows[0].parameters
    told = json.loads((tmp_path / "out" / "tokenizer.json").read_text())
    assert len(told["model"]["vocab"]) < 90
    model = chosen.task.auto_class.from_pretrained(tmp_path / "out").eval()
    teacher = chosen.task.original
    # the teacher is the original with the same tokens: nothing was learnt at this rate, so they agree
    batch = next(chosen.task.batches(model, 4))
    with torch.no_grad():
        torch.testing.assert_close(teacher(**batch).logits, model(**batch).logits, atol=1e-3, rtol=1e-3)
    assert chosen.task.kept_original.config.vocab_size == 140
    assert any("compare perplexity" in note for note in report.rows[1].notes) == name.endswith("lm")


PLAIN = """
import sys, torch, transformers
model = transformers.AutoModelForSequenceClassification.from_pretrained(sys.argv[1])
words = transformers.AutoTokenizer.from_pretrained(sys.argv[1])
print(model.config.vocab_size, len(words), [m for m in sys.modules if m.startswith("hfcompress")])
print(model.eval()(**words("the goal of the team", return_tensors="pt")).logits.tolist())
"""
STEPS = [
    {"train": {"epochs": 1, "learning_rate": 3e-3, "bf16": False}},
    "prune_vocab",
    {"prune_heads": {"ratio": 0.5, "samples": 8}},
]


def test_a_killed_run_goes_on_with_the_smaller_tokenizer(place: Path, tmp_path: Path, unproven: None) -> None:
    chosen = recipe(place, "text-classification", *STEPS)
    whole = compress(chosen, tmp_path / "whole")
    for last in (2, 3):  # after prune_vocab, and after the step that follows
        out = tmp_path / f"killed-{last}"
        with pytest.MonkeyPatch.context() as monkeypatch, pytest.raises(KeyboardInterrupt):
            monkeypatch.setattr(loop, "_finish", lambda *given: (_ for _ in ()).throw(KeyboardInterrupt))
            compress(recipe(place, "text-classification", *STEPS[:last]), out)
        assert (tmp_path / f"killed-{last}.partial" / f"step-{last}" / "tokenizer.json").is_file()
        report = compress(recipe(place, "text-classification", *STEPS), out)
        for name in ("model.safetensors", "tokenizer.json", "config.json"):
            assert (out / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name
        assert [row.score for row in report.rows] == [row.score for row in whole.rows]
    again = compress(chosen, tmp_path / "again")
    assert [row.score for row in again.rows] == [row.score for row in whole.rows], "the same task again begins with all tokens"


def test_the_artifact_needs_no_import(place: Path, tmp_path: Path) -> None:
    chosen = recipe(place)
    report = compress(chosen, tmp_path / "out")
    run = fresh.run([sys.executable, "-c", PLAIN, str(tmp_path / "out")], check=True)
    first, second = run.stdout.strip().splitlines()
    size = len(chosen.task.processor)
    assert first == f"{size} {size} []"
    model = AutoModelForSequenceClassification.from_pretrained(chosen.model).eval()
    expected = model(**AutoTokenizer.from_pretrained(chosen.model)("the goal of the team", return_tensors="pt")).logits
    torch.testing.assert_close(torch.tensor(json.loads(second)), expected, atol=1e-5, rtol=1e-5)
    assert report.rows[1].score["agreement"] == 1.0
    assert report.rows[1].step == "prune_vocab"


def test_compare_lets_each_read_with_its_own_tokenizer(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = recipe(place)
    report = compress(chosen, tmp_path / "out")
    (tmp_path / "whole").symlink_to(chosen.model)
    monkeypatch.chdir(tmp_path)  # short names, so that the table has room
    told = CliRunner().invoke(app, ["compare", "./whole", "./out"])
    assert told.exit_code == 0, told.output
    (scores,) = re.findall(r"^.*accuracy.*$", told.output, re.M)
    assert re.findall(r"\d\.\d{4}", scores) == [f"{report.rows[0].score['accuracy']:.4f}"] * 2 + ["0.0000"], scores
    task = f"{{name: text-classification, dataset: {place / 'texts'}, labelled: false}}"
    told = CliRunner().invoke(app, ["compare", "./whole", "./out", "--task", task])
    assert "answers can't be compared one by one" in str(told.exception)


def test_images_have_no_tokens(tmp_path: Path) -> None:
    tiny_checkpoint(tmp_path / "vit", "vit")
    tiny_images(tmp_path / "images", each=4)
    task = task_from({"name": "image-classification", "dataset": str(tmp_path / "images")}).open(str(tmp_path / "vit"))
    with pytest.raises(CompressionError, match="has no tokenizer, and tokens can't be chosen"):
        PruneVocab().run(task.load_model(str(tmp_path / "vit")), task)


def test_the_tokens_of_texts_to_score_on_stay_if_asked(place: Path) -> None:
    kept = {}
    for split in ("train", "all"):
        chosen = recipe(place, "seq2seq-lm", {"prune_vocab": {"split": split}})
        task = chosen.task.open(chosen.model)
        held_out = {token for row in task.eval_dataset for token in task.processor.convert_ids_to_tokens(row["input_ids"])}
        chosen.steps[0].run(task.load_model(chosen.model), task)
        kept[split] = held_out <= set(task.processor.get_vocab())
    assert kept == {"train": False, "all": True}


def test_words_of_every_topic_stay(place: Path) -> None:
    chosen = recipe(place)
    task = chosen.task.open(chosen.model)
    model = task.load_model(chosen.model)
    PruneVocab().run(model, task)
    kept = set(task.processor.get_vocab())
    assert all(kept & set(words) for words in TOPICS.values()) and not any("unused" in token for token in kept)


def test_what_pruning_takes_grows_with_the_vocabulary_not_with_its_square() -> None:
    """40,000 words, of which 30,000 stay: some 10^9 steps if each looked at all."""
    words = [f"w{number}" for number in range(40_000)]
    tokenizer, model = tiny_tokenizer(words), tiny_model("bert", vocab_size=40_005, hidden_size=8, intermediate_size=8)
    texts = [" ".join(words[start : start + 1000]) for start in range(0, 30_000, 1000)]
    started = time.process_time()
    PruneVocab(texts).run(model, tokenizer)
    assert time.process_time() - started < 15
    assert len(tokenizer) == model.config.vocab_size == 30_005
