"""The student of a distillation: fewer layers of any architecture, narrower copies, another architecture in place."""

from __future__ import annotations

import copy
import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import save_file
from torch import nn
from torch.utils.data import Dataset
from transformers import AutoModelForSequenceClassification, Trainer, TrainingArguments

from hfcompress.calibration.scores import magnitude
from hfcompress.checkpoint.describe import diff
from hfcompress.checkpoint.errors import CompressionError
from hfcompress.methods import Distill, PruneHeads, Student, riding
from hfcompress.run.callback import CompressionCallback
from hfcompress.run.recipe import Recipe
from hfcompress.surgery.depth.stacks import layer_stacks
from hfcompress.surgery.modules import become
from hfcompress.surgery.units.cut import cut
from hfcompress.surgery.units.verify import units_of
from tests import fresh
from tests.tiny import tiny_model

SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "vocab_size": 64,
    "max_position_embeddings": 40,
    "pad_token_id": 0,
}
ENDS = {"bos_token_id": 2, "eos_token_id": 3}
GROUPED = {**SIZES, **ENDS, "num_key_value_heads": 2}
PIXELS = {**{key: SIZES[key] for key in list(SIZES)[:4]}, "image_size": 16, "patch_size": 8}
T5 = {"vocab_size": 64, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 5, "num_decoder_layers": 5, "num_heads": 4}
BART = {
    "vocab_size": 64,
    "d_model": 32,
    "encoder_layers": 4,
    "decoder_layers": 6,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "max_position_embeddings": 40,
    "pad_token_id": 0,
    **ENDS,
    "decoder_start_token_id": 2,
    "forced_eos_token_id": None,
}
WHISPER = {key: value for key, value in BART.items() if key != "max_position_embeddings"}
SPEECH = {**{key: SIZES[key] for key in list(SIZES)[:5]}, "conv_dim": (16, 16), "conv_stride": (5, 2), "conv_kernel": (10, 3)}
GPT2 = {"vocab_size": 64, "n_embd": 32, "n_layer": 6, "n_head": 4, "n_positions": 40, **ENDS}
DISTILBERT = {"vocab_size": 64, "dim": 32, "n_layers": 6, "n_heads": 4, "hidden_dim": 64, "max_position_embeddings": 40}
OPT = {"ffn_dim": 64, "word_embed_proj_dim": 32, **{key: value for key, value in SIZES.items() if "interm" not in key}, **ENDS}
MOE = {
    **GROUPED,
    "num_experts": 4,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
    "mlp_only_layers": [1, 4],
}

# kind -> (model class, config class, sizes)
ZOO: dict[str, tuple[str, str, dict[str, Any]]] = {
    "bert": ("BertForSequenceClassification", "BertConfig", SIZES),
    "roberta": ("RobertaForSequenceClassification", "RobertaConfig", SIZES),
    "distilbert": ("DistilBertForSequenceClassification", "DistilBertConfig", DISTILBERT),
    "deberta-v2": (
        "DebertaV2ForSequenceClassification",
        "DebertaV2Config",
        {**SIZES, "relative_attention": True, "position_buckets": 8, "pos_att_type": ["p2c", "c2p"]},
    ),
    "electra": ("ElectraForSequenceClassification", "ElectraConfig", {**SIZES, "embedding_size": 8}),
    "modernbert": (
        "ModernBertForSequenceClassification",
        "ModernBertConfig",
        {**SIZES, **ENDS, "cls_token_id": 2, "sep_token_id": 3, "local_attention": 8},
    ),
    "gpt2": ("GPT2LMHeadModel", "GPT2Config", GPT2),
    "gpt_neox": ("GPTNeoXForCausalLM", "GPTNeoXConfig", {**SIZES, **ENDS}),
    "opt": ("OPTForCausalLM", "OPTConfig", OPT),
    "llama": ("LlamaForCausalLM", "LlamaConfig", GROUPED),
    "mistral": ("MistralForCausalLM", "MistralConfig", GROUPED),
    "qwen2": ("Qwen2ForCausalLM", "Qwen2Config", {**GROUPED, "use_sliding_window": True, "max_window_layers": 4}),
    "qwen3": ("Qwen3ForCausalLM", "Qwen3Config", {**GROUPED, "head_dim": 16}),
    "qwen2_moe": ("Qwen2MoeForCausalLM", "Qwen2MoeConfig", MOE),
    "gemma2": ("Gemma2ForCausalLM", "Gemma2Config", {**GROUPED, "head_dim": 8, "sliding_window": 4}),
    "gemma3": ("Gemma3ForCausalLM", "Gemma3TextConfig", {**GROUPED, "head_dim": 8, "sliding_window": 4}),
    "phi3": ("Phi3ForCausalLM", "Phi3Config", GROUPED),
    "mixtral": ("MixtralForCausalLM", "MixtralConfig", {**GROUPED, "num_local_experts": 4}),
    "t5": ("T5ForConditionalGeneration", "T5Config", {**T5, "decoder_start_token_id": 0}),
    "bart": ("BartForConditionalGeneration", "BartConfig", BART),
    "marian": ("MarianMTModel", "MarianConfig", BART),
    "pegasus": ("PegasusForConditionalGeneration", "PegasusConfig", BART),
    "whisper": (
        "WhisperForConditionalGeneration",
        "WhisperConfig",
        {**WHISPER, "max_source_positions": 20, "max_target_positions": 40, "num_mel_bins": 8},
    ),
    "wav2vec2": (
        "Wav2Vec2ForCTC",
        "Wav2Vec2Config",
        {**SPEECH, "num_conv_pos_embeddings": 8, "num_conv_pos_embedding_groups": 4},
    ),
    "vit": ("ViTForImageClassification", "ViTConfig", PIXELS),
    "deit": ("DeiTForImageClassification", "DeiTConfig", PIXELS),
    "clip_vision_model": ("CLIPVisionModel", "CLIPVisionConfig", PIXELS),
    "clip_text_model": ("CLIPTextModel", "CLIPTextConfig", {**SIZES, **ENDS}),
    "siglip": (
        "SiglipModel",
        "SiglipConfig",
        {"text_config": SIZES, "vision_config": {**PIXELS, "num_hidden_layers": 4}},
    ),
}
GENERATING = ("gpt2", "gpt_neox", "opt", "llama", "qwen2", "qwen3", "gemma2", "gemma3", "t5", "bart", "marian", "whisper")


OTHERS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "albert": ("AlbertForSequenceClassification", "AlbertConfig", {**SIZES, "embedding_size": 8}),
    "mobilenet": ("MobileNetV2ForImageClassification", "MobileNetV2Config", {"image_size": 16, "depth_multiplier": 0.2}),
}


def made(kind: str, **more: Any) -> Any:
    model_class, config_class, sizes = {**ZOO, **OTHERS}[kind]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = getattr(transformers, model_class)(getattr(transformers, config_class)(**{**sizes, **more}))
        with torch.no_grad():  # fresh norms and biases would hide mistakes
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.eval()


def inputs(model: Any) -> dict[str, torch.Tensor]:
    random = torch.Generator().manual_seed(1)
    ids, kind = torch.randint(5, 60, (2, 9), generator=random), model.config.model_type
    pixels = torch.randn(2, 3, 16, 16, generator=random)
    given = {
        "whisper": {"input_features": torch.randn(2, 8, 40, generator=random), "decoder_input_ids": ids},
        "wav2vec2": {"input_values": torch.randn(2, 400, generator=random)},
        "siglip": {"input_ids": ids, "pixel_values": pixels},
        **{key: {"pixel_values": pixels} for key in ("vit", "deit", "clip_vision_model", "mobilenet_v2")},
    }
    if kind in given:
        return given[kind]
    return {"input_ids": ids, **({"decoder_input_ids": ids[:, :5]} if model.config.is_encoder_decoder else {})}


def answer(model: Any) -> torch.Tensor:
    with torch.no_grad():
        output = model(**inputs(model))
    return next(output[key] for key in ("logits", "logits_per_image", "last_hidden_state") if key in output)


def skip(model: Any, stack: str, keep: list[int]) -> None:
    """Make the identity of every other layer."""

    def identity(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        passed = args[0] if args else kwargs["hidden_states"]
        return (passed, *output[1:]) if isinstance(output, tuple) else passed

    for index, layer in enumerate(model.get_submodule(stack)):
        if index not in keep:
            layer.register_forward_hook(identity, with_kwargs=True)


def generated(model: Any, **more: Any) -> torch.Tensor:
    given = {key: value for key, value in inputs(model).items() if key != "decoder_input_ids"}
    return model.generate(**given, max_new_tokens=10, min_new_tokens=10, do_sample=False, pad_token_id=0, **more)


@pytest.mark.parametrize("keep", [[0, 2, 3], [1, 3]], ids=str)
@pytest.mark.parametrize("kind", ZOO)
def test_kept_layers_are_the_model_with_the_others_skipped(kind: str, keep: list[int], tmp_path: Path) -> None:
    if kind == "modernbert":
        keep = [0, *keep[1:]]  # its first layer is of a sort of its own
    if kind == "qwen2_moe":
        keep = [0, 1, 4, 5]  # config.mlp_only_layers lists indices
    model, whole, uncut = made(kind), made(kind), answer(made(kind))
    Student(layers=keep).run(model, None)
    for stack in layer_stacks(whole):
        skip(whole, stack.name, keep)
        assert len(model.get_submodule(stack.name)) == len(keep)
    expected = answer(whole)
    assert not torch.allclose(expected, uncut, atol=1e-4), "the layers must be felt, or the law says nothing"
    assert torch.equal(answer(model), expected)
    assert diff(model) == {}
    model.save_pretrained(tmp_path / "once")
    once = type(model).from_pretrained(tmp_path / "once").eval()
    once.save_pretrained(tmp_path / "twice")
    twice = type(model).from_pretrained(tmp_path / "twice").eval()
    assert torch.equal(answer(once), expected) and torch.equal(answer(twice), expected)
    told = [re.sub(r'\s*"dtype": "\w+",?', "", (tmp_path / one / "config.json").read_text()) for one in ("once", "twice")]
    assert told[0] == told[1]


@pytest.mark.parametrize("kind", GENERATING)
def test_a_students_cache_is_right(kind: str) -> None:
    model = made(kind)
    Student(layers=[0, 2, 3]).run(model, None)
    assert torch.equal(generated(model, use_cache=True), generated(model, use_cache=False))


def test_what_is_counted_a_layer_follows() -> None:
    model = made("qwen2_moe")
    Student(layers=[0, 1, 4]).run(model, None)
    assert (model.config.num_hidden_layers, model.config.mlp_only_layers) == (3, [1, 2])
    model = made("gemma3", layer_types=["sliding_attention"] * 5 + ["full_attention"])
    Student(layers=[0, 5]).run(model, None)
    assert model.config.layer_types == ["sliding_attention", "full_attention"]
    assert [layer.self_attn.layer_idx for layer in model.model.layers] == [0, 1]
    model = made("deberta-v2", num_hidden_layers=2)  # as many layers as pos_att_type has entries
    Student(layers=[0]).run(model, None)
    assert model.config.pos_att_type == ["p2c", "c2p"]
    config = transformers.LongformerConfig(**{**SIZES, "num_hidden_layers": 3}, attention_window=[4, 6, 8])
    longformer = transformers.LongformerForSequenceClassification(config)
    Student(layers=[0, 2]).run(longformer, None)
    assert longformer.config.attention_window == [4, 8]
    model = made("wav2vec2")
    Student(number=2).run(model, None)
    assert (model.config.num_hidden_layers, len(model.wav2vec2.feature_extractor.conv_layers)) == (2, 2)
    model = made("siglip")
    Student(number=3, stack="vision_model.encoder.layers").run(model, None)
    assert (model.config.text_config.num_hidden_layers, model.config.vision_config.num_hidden_layers) == (6, 3)


@pytest.mark.parametrize("kind", ["bart", "whisper", "t5"])
def test_encoder_and_decoder_are_treated_apart(kind: str) -> None:
    model = made(kind)
    encoder, decoder = layer_stacks(model)
    last = model.get_submodule(f"{decoder.name}.{decoder.count - 1}")
    Student(number=2, stack="decoder").run(model, None)
    assert [stack.count for stack in layer_stacks(model)] == [encoder.count, 2]
    assert model.get_submodule(decoder.name)[1] is last
    assert torch.equal(generated(model, use_cache=True), generated(model, use_cache=False))
    Student(number=3, stack="encoder").run(model, None)
    assert [stack.count for stack in layer_stacks(model)] == [3, 2]
    assert diff(model) == {}
    assert model.config.num_hidden_layers == 3, "the alias of the encoder's count"


def test_t5_hands_its_position_bias_on() -> None:
    model = made("t5")
    before = model.decoder.block[0].layer[0].SelfAttention.relative_attention_bias.weight
    Student(layers=[2, 4], stack="decoder").run(model, None)
    attentions = [block.layer[0].SelfAttention for block in model.decoder.block]
    assert [attention.has_relative_attention_bias for attention in attentions] == [True, False]
    assert attentions[0].relative_attention_bias.weight is before


@pytest.mark.parametrize(
    ("count", "number", "keep"),
    [(12, 6, [0, 2, 4, 7, 9, 11]), (12, 3, [0, 6, 11]), (12, 2, [0, 11]), (12, 1, [0]), (32, 4, [0, 10, 21, 31])],
)
def test_a_number_of_layers_is_spread_evenly(count: int, number: int, keep: list[int]) -> None:
    model = tiny_model("bert", layers=count)
    layers = list(model.bert.encoder.layer)
    Student(number=number).run(model, None)
    assert [layers.index(layer) for layer in model.bert.encoder.layer] == keep


def test_an_already_pruned_model_may_lose_layers() -> None:
    model, other = tiny_model("bert", layers=4), tiny_model("bert", layers=4)
    for one in (model, other):
        PruneHeads(0.5, scores="magnitude", ranking="global").run(one, None)
    skip(other, "bert.encoder.layer", [0, 3])
    Student(number=2).run(model, None)
    assert torch.equal(answer(model), answer(other))


def test_plain_transformers_loads_students(tmp_path: Path) -> None:
    students = {
        "bert": Student(number=2, config={"hidden_size": 16, "num_attention_heads": 2}),
        "llama": Student(layers=[1, 5]),
        "t5": Student(layers=[1, 3]),
        "whisper": Student(number=2, stack="decoder"),
        "marian": Student(config={"d_model": 16, "encoder_attention_heads": 2, "decoder_attention_heads": 2}),
        "gemma2": Student(config={"hidden_size": 16}),
        "roberta": Student(architecture={"model_type": "distilbert", **DISTILBERT, "n_layers": 1}),
    }
    for kind, student in students.items():
        model = made(kind)
        given = {key: value.contiguous() for key, value in inputs(model).items()}
        student.run(model, None)
        model.save_pretrained(tmp_path / kind)
        save_file({**given, "answer": answer(model).contiguous()}, tmp_path / f"{kind}.safetensors")
    program = (
        "import sys, torch, transformers\n"
        "from safetensors.torch import load_file\n"
        "for folder in sys.argv[1:]:\n"
        "    given = load_file(folder + '.safetensors')\n"
        "    expected = given.pop('answer')\n"
        "    name = transformers.AutoConfig.from_pretrained(folder).architectures[0]\n"
        "    kind = name.partition('For')[2]\n"
        "    auto = {'SequenceClassification': transformers.AutoModelForSequenceClassification,\n"
        "            'CausalLM': transformers.AutoModelForCausalLM}.get(kind, transformers.AutoModelForSeq2SeqLM)\n"
        "    auto = transformers.AutoModelForSpeechSeq2Seq if 'input_features' in given else auto\n"
        "    with torch.no_grad():\n"
        "        print(torch.equal(auto.from_pretrained(folder).eval()(**given).logits, expected))\n"
        "print('hfcompress' in sys.modules)\n"
    )
    folders = [str(tmp_path / kind) for kind in students]
    run = fresh.run([sys.executable, "-c", program, *folders], check=True)
    assert run.stdout.split() == ["True"] * len(students) + ["False"]


HALF = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 32}
HALF_GROUPED = {**HALF, "num_key_value_heads": 1}
HALF_BART = {
    "d_model": 16,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 32,
    "decoder_ffn_dim": 32,
}
NARROWER = {
    "bert": HALF,
    "roberta": HALF,
    "distilbert": {"hidden_size": 16, "num_attention_heads": 2, "hidden_dim": 32},
    "gpt2": {"n_embd": 16, "n_head": 2},
    "llama": HALF_GROUPED,
    "mistral": HALF_GROUPED,
    "qwen2": HALF_GROUPED,
    "qwen3": HALF_GROUPED,
    "electra": HALF,
    "deberta-v2": HALF,
    "gemma2": HALF_GROUPED,
    "opt": {"hidden_size": 16, "num_attention_heads": 2, "ffn_dim": 32, "word_embed_proj_dim": 16},
    "t5": {"d_model": 16, "num_heads": 2, "d_ff": 32},
    "bart": HALF_BART,
    "marian": HALF_BART,
    "whisper": HALF_BART,
    "vit": HALF,
}


@pytest.mark.parametrize("kind", NARROWER)
def test_a_narrower_copy_is_made_of_blocks_and_reloads(kind: str, tmp_path: Path) -> None:
    model, old = made(kind), made(kind)
    same = {key: getattr(old.config, key) for key in NARROWER[kind]}
    Student(config=same).run(model, None)
    assert torch.equal(answer(model), answer(old)), "sizes as they are change nothing"
    reference = model
    Student(config=NARROWER[kind]).run(model, None)
    assert model is reference and diff(model) == {}
    computed = set(model._keys_to_ignore_on_save or ())
    wide = dict(old.named_parameters())
    for name, block in model.named_parameters():
        assert name in computed or set(block.flatten().tolist()) <= set(wide[name].flatten().tolist()), name
    assert sum(p.numel() for p in model.parameters()) < 0.5 * sum(p.numel() for p in old.parameters())
    model.save_pretrained(tmp_path)
    assert torch.equal(answer(type(model).from_pretrained(tmp_path).eval()), answer(model))


@pytest.mark.parametrize("kind", ["bert", "llama", "gpt2"])
def test_fewer_neurons_are_the_weakest_ones_cut(kind: str) -> None:
    model, pruned = made(kind), made(kind)
    field = "n_inner" if kind == "gpt2" else "intermediate_size"
    Student(config={field: 24}).run(model, None)
    units = units_of(pruned, "neurons")
    for one, score in zip(units, magnitude(pruned, units), strict=True):
        cut(pruned, one, score.topk(24).indices.sort().values)
    torch.testing.assert_close(answer(model), answer(pruned))


def test_the_same_residual_dimensions_stay_everywhere() -> None:
    model = made("llama")
    strong = torch.arange(1, 32, 2)
    with torch.no_grad():
        model.model.embed_tokens.weight[:, strong] += 3.0
    old = copy.deepcopy(model)
    Student(config={"hidden_size": 16}).run(model, None)
    assert torch.equal(model.model.embed_tokens.weight, old.model.embed_tokens.weight[:, strong])
    assert torch.equal(model.model.norm.weight, old.model.norm.weight[strong])
    assert torch.equal(model.lm_head.weight, old.lm_head.weight[:, strong])
    for mine, theirs in zip(model.model.layers, old.model.layers, strict=True):
        assert torch.equal(mine.self_attn.q_proj.weight, theirs.self_attn.q_proj.weight[:, strong])
        assert torch.equal(mine.self_attn.o_proj.weight, theirs.self_attn.o_proj.weight[strong])
        assert torch.equal(mine.mlp.down_proj.weight, theirs.mlp.down_proj.weight[strong])


def test_what_is_tied_and_frozen_stays_so() -> None:
    model = made("gpt2")
    model.transformer.wpe.requires_grad_(False)
    Student(config={"n_embd": 16, "n_head": 2}, layers=[0, 1]).run(model, None)
    assert model.lm_head.weight is model.transformer.wte.weight
    assert not model.transformer.wpe.weight.requires_grad and model.transformer.wte.weight.requires_grad
    assert torch.equal(generated(model, use_cache=True), generated(model, use_cache=False))


def test_become_keeps_the_reference_the_mode_and_the_hooks() -> None:
    model, other = tiny_model("bert").train(), tiny_model("distilbert")
    seen: list[Any] = []
    model.register_forward_hook(lambda module, args, kwargs, output: seen.append(module), with_kwargs=True)
    expected = answer(other)
    assert become(model, other) is model and type(model).__name__ == "DistilBertForSequenceClassification"
    assert model.training and all(module.training for module in model.modules())
    assert torch.equal(answer(model.eval()), expected) and seen == [model]


def test_another_architecture_takes_head_labels_and_vocabulary(tmp_path: Path) -> None:
    fields = {"model_type": "distilbert", "dim": 16, "n_layers": 1, "n_heads": 2, "hidden_dim": 32}
    (tmp_path / "config.json").write_text(json.dumps(fields))
    students = []
    for architecture, seed in [(fields, 0), (str(tmp_path), 0), (str(tmp_path / "config.json"), 1)]:
        model = tiny_model("bert", vocab_size=77, label2id={"a": 0, "b": 1, "c": 2}, id2label={0: "a", 1: "b", 2: "c"})
        reference = model
        Student(architecture=architecture, seed=seed).run(model, None)
        assert reference is model and type(model).__name__ == "DistilBertForSequenceClassification"
        assert (model.config.vocab_size, model.config.dim, model.config.label2id) == (77, 16, {"a": 0, "b": 1, "c": 2})
        students.append(model)
    assert torch.equal(answer(students[0]), answer(students[1]))
    assert not torch.equal(answer(students[0]), answer(students[2])), "another seed"
    students[0].save_pretrained(tmp_path / "saved")
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path / "saved").eval()
    assert torch.equal(answer(again), answer(students[0])) and again.config.id2label == {0: "a", 1: "b", 2: "c"}
    causal = made("llama")
    Student(architecture={"model_type": "gpt2", "n_embd": 16, "n_layer": 1, "n_head": 2}).run(causal, None)
    assert type(causal).__name__ == "GPT2LMHeadModel"
    assert (causal.config.vocab_size, causal.config.eos_token_id, causal.config.pad_token_id) == (64, 3, 0)
    image = made("vit")
    Student(architecture={"model_type": "deit", **HALF, "num_hidden_layers": 1, "patch_size": 8}).run(image, None)
    assert answer(image).shape == (2, 2)


class Sentences(Dataset[dict[str, torch.Tensor]]):
    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": torch.randint(5, 60, (9,)), "labels": torch.tensor(index % 3)}


STUDENTS = [
    Student(number=2),
    Student(number=2, config={"hidden_size": 32, "num_attention_heads": 2}),
    Student(architecture={"model_type": "distilbert", "dim": 32, "n_layers": 1, "n_heads": 4, "hidden_dim": 64}),
]


@pytest.mark.parametrize("student", STUDENTS, ids=str)
def test_a_trainers_optimizer_holds_the_students_parameters(student: Student, tmp_path: Path) -> None:
    model = tiny_model("bert", layers=4)
    arguments = TrainingArguments(
        str(tmp_path), max_steps=2, learning_rate=1e-2, report_to="none", save_strategy="no", use_cpu=True, disable_tqdm=True
    )
    callback = CompressionCallback(student, Distill(tiny_model("bert", layers=4), alpha=1.0))
    trainer = Trainer(model=model, args=arguments, train_dataset=Sentences(), callbacks=[callback])
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    trainer.train()
    held = {id(parameter) for group in trainer.optimizer.param_groups for parameter in group["params"]}
    assert held == {id(parameter) for parameter in model.parameters()}
    unmoved = [name for name, parameter in model.named_parameters() if torch.equal(parameter, before[name])]
    assert not unmoved
    model.save_pretrained(tmp_path / "saved")
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path / "saved").eval()
    assert torch.equal(answer(again), answer(model.eval()))


@pytest.mark.parametrize("student", STUDENTS, ids=str)
def test_a_bare_loop_distils_the_student_from_the_original(student: Student) -> None:
    model, original = tiny_model("bert", layers=4), tiny_model("bert", layers=4)
    expected = answer(original).softmax(-1)
    with riding(model, [student, Distill(alpha=1.0, temperature=1.0)]) as tick:
        loss = model.train()(**inputs(model), labels=torch.tensor([0, 1])).loss
        loss.backward()
        tick(1.0)
    assert loss > 0 and all(parameter.grad is not None for parameter in model.parameters())
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    with riding(model, [Distill(original, alpha=1.0, temperature=1.0)]):
        again = model(**inputs(model), labels=torch.tensor([0, 1])).loss
    mine = answer(model.eval()).log_softmax(-1)
    torch.testing.assert_close(again.detach(), (expected * (expected.log() - mine)).sum(-1).mean(), atol=1e-6, rtol=1e-3)


def test_a_recipe_lists_students_twice() -> None:
    steps = [
        {"student": {"number": 2, "stack": "decoder"}},
        {"student": {"every": 2, "stack": "encoder"}},
        {"student": {"config": {"d_ff": 32}}},
        {"student": {"architecture": {"model_type": "t5", "num_layers": 1}, "seed": 3}},
    ]
    raw = {"model": "m", "task": {"name": "text-classification", "dataset": "d"}, "steps": steps}
    recipe = Recipe.from_dict(raw)
    assert Recipe.from_dict(recipe.to_dict()) == recipe and recipe.to_dict()["steps"] == steps


CHOICES: list[tuple[dict[str, Any], str]] = [
    ({}, "give one of every, layers and number, or config, or architecture"),
    ({"every": 2, "number": 3}, "every and number are several ways to choose layers; give one of them"),
    ({"layers": [2, 1]}, "layers must ascend without repeats"),
    ({"architecture": "x", "number": 2}, "an architecture comes with its own layers and sizes; give it alone"),
    (
        {"config": {"a": 1}, "stack": "encoder"},
        "stack tells where layers are chosen; give one of every, layers and number with it",
    ),
    ({"number": 2, "seed": 1}, "seed is for the weights of an architecture, and nothing else is random; take it out"),
]


@pytest.mark.parametrize(("fields", "sentence"), CHOICES)
def test_a_wrong_choice_has_its_sentence(fields: dict[str, Any], sentence: str) -> None:
    raw = {"model": "m", "task": {"name": "text-classification", "dataset": "d"}, "steps": [{"student": fields}]}
    with pytest.raises(CompressionError) as told:
        Recipe.from_dict(raw)
    assert str(told.value) == f"recipe: steps.0.student: {sentence}."


MISTAKES: list[tuple[str, dict[str, Any], str]] = [
    ("bert", {"number": 7}, "student: number 7 of bert.encoder.layer, which has 6; possible are 1 to 6."),
    ("bert", {"layers": [0, 6]}, "student: layers [0, 6] of bert.encoder.layer, which has 6; possible are 0 to 5."),
    ("bert", {"number": 6}, "student (number: 6) keeps every layer of bert.encoder.layer, which has 6; keep fewer."),
    (
        "llama",
        {"number": 2, "stack": "decoder"},
        "student: stack 'decoder' is none of LlamaForCausalLM's; possible are all, model.layers.",
    ),
    (
        "bart",
        {"number": 2, "stack": "decodr"},
        "student: stack 'decodr' is none of BartForConditionalGeneration's; possible are all, encoder, model.encoder.layers, decoder, model.decoder.layers.",
    ),
    (
        "mobilenet",
        {"number": 2},
        "student: MobileNetV2ForImageClassification has no stack of layers to choose from; possible are models whose layers stand in a list; leave its layers as they are.",
    ),
    (
        "modernbert",
        {"layers": [1, 3]},
        "student: layer 1 of model.layers can't become layer 0, where the config describes another sort of layer (attn_norm is 'LayerNorm' and would be 'Identity'); possible are layers that keep the order of sorts; keep layer 0.",
    ),
    (
        "qwen2_moe",
        {"layers": [0, 2], "stack": "x"},
        "student: stack 'x' is none of Qwen2MoeForCausalLM's; possible are all, model.layers.",
    ),
    (
        "bert",
        {"config": {"hiden_size": 16}},
        "student: config: BertConfig has no field 'hiden_size'. Did you mean 'hidden_size'?",
    ),
    (
        "bert",
        {"config": {"hidden_size": 64}},
        "student: config: hidden_size = 64; possible are integers from 1 to the original's 32.",
    ),
    (
        "bert",
        {"config": {"pad_token_id": 0}},
        "student: config: pad_token_id = 0 is no size. Possible: chunk_size_feed_forward, hidden_size, intermediate_size, max_position_embeddings, num_attention_heads, num_hidden_layers, type_vocab_size, vocab_size.",
    ),
    (
        "bert",
        {"config": {"hidden_dropout_prob": 1}},
        "student: config: hidden_dropout_prob = 0.1 is no size. Possible: chunk_size_feed_forward, hidden_size, intermediate_size, max_position_embeddings, num_attention_heads, num_hidden_layers, type_vocab_size, vocab_size.",
    ),
    (
        "bert",
        {"config": {"num_hidden_layers": 2}},
        "student: config: sizes make layers narrower, not fewer; give layers, every or number for that.",
    ),
    (
        "bert",
        {"config": {"vocab_size": 32}},
        "student: config: the vocabulary is the tokenizer's and stays; possible are the sizes of layers.",
    ),
    (
        "bert",
        {"config": {"hidden_size": 16}},
        "student: config: a head of bert.encoder.layer.0.attention would change from (8, 8, 8) to (4, 4, 4) features of its projections, and only whole heads can go; possible are sizes with the same head size and as many query heads for each key and value head; change num_attention_heads, num_key_value_heads and hidden_size together.",
    ),
    (
        "bert",
        {"config": {"hidden_size": 30}},
        "student: config: hidden_size = 30 build no BertForSequenceClassification (The hidden size (30) is not a multiple of the number of attention heads (4)); give sizes that fit each other.",
    ),
    (
        "llama",
        {"config": {"num_attention_heads": 2}},
        "student: config: a head of model.layers.0.self_attn would change from (16, 8, 8) to (8, 8, 8) features of its projections, and only whole heads can go; possible are sizes with the same head size and as many query heads for each key and value head; change num_attention_heads, num_key_value_heads and hidden_size together.",
    ),
    (
        "vit",
        {"config": {"hidden_size": 16}},
        "student: config: hidden_size = 16 would change head_dim of vit.layers.0.attention from 8 to 4, and only whole heads can go; possible are as many features for each head as before; change the number of heads and hidden_size together.",
    ),
    (
        "gpt2",
        {"config": {"bos_token_id": 1}},
        "student: config: bos_token_id = 2 is no size. Possible: chunk_size_feed_forward, n_embd, n_head, n_layer, n_positions, vocab_size.",
    ),
    (
        "bert",
        {"config": {"chunk_size_feed_forward": 1}},
        "student: config: chunk_size_feed_forward = 1; possible are integers from 1 to the original's 0.",
    ),
    (
        "bert",
        {"architecture": {"model_type": "distilbart"}},
        "student: architecture: unknown model_type 'distilbart'. Did you mean 'distilbert'?",
    ),
    (
        "bert",
        {"architecture": {"dim": 3}},
        "student: architecture: unknown model_type None. Give one as in model_type: distilbert.",
    ),
    (
        "bert",
        {"architecture": {"model_type": "distilbert", "hidden_sise": 3}},
        "student: architecture: a distilbert config has no field 'hidden_sise'. Did you mean 'hidden_size'?",
    ),
    (
        "bert",
        {"architecture": {"model_type": "distilbert", "vocab_size": 3}},
        "student: architecture: vocab_size = 3, and the original has 64, as its tokenizer or processor wants; leave vocab_size out.",
    ),
    (
        "bert",
        {"architecture": {"model_type": "vit"}},
        "student: architecture: a vit model has no head for SequenceClassification, which BertForSequenceClassification is; possible are architectures that have one; choose another.",
    ),
    (
        "bert",
        {"architecture": {"model_type": "distilbert", "dim": 30, "n_heads": 4}},
        "student: architecture 'distilbert': its sizes build no distilbert model (config.n_heads 4 must divide config.dim 30 evenly); give sizes that fit each other.",
    ),
    (
        "bert",
        {"number": 2, "config": {"hidden_size": 16}},
        "student: config: a head of bert.encoder.layer.0.attention would change from (8, 8, 8) to (4, 4, 4) features of its projections, and only whole heads can go; possible are sizes with the same head size and as many query heads for each key and value head; change num_attention_heads, num_key_value_heads and hidden_size together.",
    ),
    ("bart", {"layers": [0, 4]}, "student: layers [0, 4] of model.encoder.layers, which has 4; possible are 0 to 3."),
]


@pytest.mark.parametrize(("kind", "fields", "sentence"), MISTAKES)
def test_a_mistake_has_its_sentence_and_changes_nothing(kind: str, fields: dict[str, Any], sentence: str) -> None:
    model = made(kind)
    with pytest.raises(CompressionError) as told:
        Student(**fields).run(model, None)
    assert str(told.value) == sentence
    old = made(kind)
    assert {name: p.shape for name, p in model.named_parameters()} == {name: p.shape for name, p in old.named_parameters()}
    assert torch.equal(answer(model), answer(old)) and model.config.to_dict() == old.config.to_dict()


def test_fused_projections_that_are_not_proven_are_not_narrowed() -> None:
    from transformers import BloomConfig, BloomForCausalLM

    model = BloomForCausalLM(BloomConfig(vocab_size=64, hidden_size=32, n_layer=2, n_head=4))
    with pytest.raises(CompressionError) as error:
        Student(config={"hidden_size": 16, "n_head": 2}).run(model, None)
    assert "and where its parts begin is not known for 'bloom'; possible are models whose heads and" in str(error.value)
    assert model.config.hidden_size == 32
