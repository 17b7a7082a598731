"""Small real tokenizers of each kind, trained on the licence: the classes that transformers has for them, as they are loaded."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import (
    AlbertTokenizer,
    AutoTokenizer,
    BertTokenizer,
    CLIPTokenizer,
    GemmaTokenizer,
    GPT2Tokenizer,
    LlamaTokenizer,
    PreTrainedTokenizerFast,
    RobertaTokenizer,
    T5Tokenizer,
    XLMRobertaTokenizer,
)

LICENCE = [part.strip() for part in (Path(__file__).parents[2] / "LICENSE").read_text().split("\n\n") if part.strip()]
TEXTS, OTHERS = LICENCE[: len(LICENCE) // 3], LICENCE[len(LICENCE) // 3 :]
SIZE = 700
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]


def _trained(model: Any, trainer: Any, split: Any = None, normalizer: Any = None) -> Tokenizer:
    made = Tokenizer(model)
    if split is not None:
        made.pre_tokenizer = split
    if normalizer is not None:
        made.normalizer = normalizer
    made.train_from_iterator(LICENCE, trainer)
    return made


def _bpe(
    special: list[str], split: Any = None, normalizer: Any = None, **more: Any
) -> tuple[dict[str, int], list[tuple[str, str]]]:
    alphabet = pre_tokenizers.ByteLevel.alphabet() if isinstance(split, pre_tokenizers.ByteLevel) else []
    trainer = trainers.BpeTrainer(
        vocab_size=SIZE, special_tokens=special, initial_alphabet=alphabet, show_progress=False, max_token_length=12, **more
    )
    told = _trained(models.BPE(**more), trainer, split, normalizer)
    import json

    model = json.loads(told.to_str())["model"]
    return model["vocab"], [tuple(pair) for pair in model["merges"]]


def _unigram(special: list[str]) -> list[tuple[str, float]]:
    trainer = trainers.UnigramTrainer(vocab_size=SIZE, special_tokens=special, unk_token="<unk>", show_progress=False)
    import json

    told = _trained(models.Unigram(), trainer, pre_tokenizers.Metaspace())
    return [tuple(entry) for entry in json.loads(told.to_str())["model"]["vocab"]]


def bert() -> Any:
    trainer = trainers.WordPieceTrainer(
        vocab_size=SIZE, special_tokens=["[PAD]", "[unused0]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"], show_progress=False
    )
    made = _trained(
        models.WordPiece(unk_token="[UNK]"), trainer, pre_tokenizers.BertPreTokenizer(), normalizers.BertNormalizer()
    )
    return BertTokenizer(vocab=made.get_vocab(), model_max_length=64)


def roberta() -> Any:
    vocab, merges = _bpe(["<s>", "<pad>", "</s>", "<unk>", "<mask>"], pre_tokenizers.ByteLevel(add_prefix_space=False))
    return RobertaTokenizer(vocab=vocab, merges=merges)


def gpt2() -> Any:
    vocab, merges = _bpe([], pre_tokenizers.ByteLevel(add_prefix_space=False))
    made = GPT2Tokenizer(vocab={**vocab, "<|endoftext|>": len(vocab)}, merges=merges)
    made.add_tokens(["myword"])
    return made


def llama3() -> Any:
    """Byte-level, whole words looked up first, special tokens behind the vocabulary."""
    split = pre_tokenizers.ByteLevel(add_prefix_space=False)
    vocab, merges = _bpe([], split)
    made = Tokenizer(models.BPE(vocab=vocab, merges=merges[: len(merges) // 2], ignore_merges=True))
    made.pre_tokenizer, made.decoder = split, decoders.ByteLevel()
    made.add_special_tokens(["<|begin|>", "<|end|>", "<|reserved_0|>"])
    made.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=False),
            processors.TemplateProcessing(single="<|begin|> $A", special_tokens=[("<|begin|>", len(vocab))]),
        ]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=made,
        bos_token="<|begin|>",
        eos_token="<|end|>",
        pad_token="<|end|>",
        padding_side="left",
        chat_template="{% for m in messages %}{{ m.content }}{% endfor %}",
    )


def clip() -> Any:
    vocab, merges = _bpe([], pre_tokenizers.ByteLevel(add_prefix_space=False), end_of_word_suffix="</w>")
    vocab = {**vocab, "<|startoftext|>": len(vocab), "<|endoftext|>": len(vocab) + 1}
    return CLIPTokenizer(vocab=vocab, merges=merges)


def _byte_fallback(special: list[str]) -> tuple[dict[str, int], list[tuple[str, str]]]:
    vocab, merges = _bpe(special, normalizer=normalizers.Replace(" ", "▁"))
    words = [token for token in vocab if token not in special]
    return {token: index for index, token in enumerate([*special, *BYTES, *words])}, merges


def llama() -> Any:
    vocab, merges = _byte_fallback(["<unk>", "<s>", "</s>"])
    return LlamaTokenizer(vocab=vocab, merges=merges)


def gemma() -> Any:
    vocab, merges = _byte_fallback(["<pad>", "<eos>", "<bos>", "<unk>", "<mask>"])
    return GemmaTokenizer(vocab=vocab, merges=merges)


def xlm_roberta() -> Any:
    vocab = _unigram(["<s>", "<pad>", "</s>", "<unk>"])
    return XLMRobertaTokenizer(vocab=[*vocab, ("<mask>", 0.0)])


def t5() -> Any:
    vocab = _unigram(["<pad>", "</s>", "<unk>"])
    return T5Tokenizer(vocab=[*vocab, *((f"<extra_id_{number}>", 0.0) for number in reversed(range(10)))], extra_ids=10)


def albert() -> Any:
    return AlbertTokenizer(vocab=_unigram(["<pad>", "<unk>", "[CLS]", "[SEP]", "[MASK]"]))


def word_level() -> Any:
    from tests.tiny import tiny_tokenizer

    return tiny_tokenizer(dict.fromkeys(word.lower().strip(".,;:()") for part in LICENCE for word in part.split()))


MADE: dict[str, Callable[[], Any]] = {
    made.__name__: made for made in (bert, roberta, gpt2, llama3, clip, llama, gemma, xlm_roberta, t5, albert, word_level)
}


def tokenizer(kind: str, folder: Path) -> Any:
    """As AutoTokenizer loads it: classes build parts anew then."""
    MADE[kind]().save_pretrained(folder)
    return AutoTokenizer.from_pretrained(folder)
