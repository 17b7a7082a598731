"""What the tests share: random models of many kinds, a tokenizer of known words, a folder of learnable texts."""

from __future__ import annotations

import random
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.normalizers import Lowercase
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    BartConfig,
    BertConfig,
    DistilBertConfig,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
    RobertaConfig,
    T5Config,
    ViTConfig,
)
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
TOPICS = {
    "animals": ["cat", "dog", "horse", "fish", "bird", "mouse", "cow", "sheep"],
    "money": ["bank", "price", "market", "share", "trade", "profit", "stock", "tax"],
    "sport": ["goal", "match", "team", "score", "player", "cup", "league", "race"],
}
FILLER = ["the", "a", "of", "and", "to", "in", "was", "is", "for", "on", "with", "that", "by", "this"]
WORDS = [*FILLER, *(word for words in TOPICS.values() for word in words)]

ENCODERS = ("bert", "minilm", "roberta", "distilbert")
DECODERS = ("llama", "qwen2", "qwen3", "mistral", "gpt2")
KINDS = (*ENCODERS, *DECODERS)
SEQ2SEQ = ("t5", "bart")
VISION = ("vit",)
TASKS = {
    "text-classification": AutoModelForSequenceClassification,
    "token-classification": AutoModelForTokenClassification,
    "causal-lm": AutoModelForCausalLM,
    "masked-lm": AutoModelForMaskedLM,
    "seq2seq-lm": AutoModelForSeq2SeqLM,
    "image-classification": AutoModelForImageClassification,
}
MADE_FOR = {
    **dict.fromkeys(ENCODERS, "text-classification"),
    **dict.fromkeys(DECODERS, "causal-lm"),
    **dict.fromkeys(SEQ2SEQ, "seq2seq-lm"),
    **dict.fromkeys(VISION, "image-classification"),
}


def tiny_config(kind: str, vocab_size: int = 128, layers: int = 2, num_labels: int = 3, **more: Any) -> PreTrainedConfig:
    """Hidden 64, 4 heads (2 groups of keys and values where the kind has groups), 128 neurons; [PAD] is token 0."""
    sizes = {
        "hidden_size": 64,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "intermediate_size": 128,
        "max_position_embeddings": 130,
    }
    grouped = {**sizes, "num_key_value_heads": 2, "bos_token_id": 2, "eos_token_id": 3}
    gpt2 = {"n_embd": 64, "n_layer": layers, "n_head": 4, "n_inner": 128, "n_positions": 128}
    distilbert = {"dim": 64, "n_layers": layers, "n_heads": 4, "hidden_dim": 128, "max_position_embeddings": 128}
    bart = {
        "d_model": 64,
        **{
            f"{side}_{name}": size
            for side in ("encoder", "decoder")
            for name, size in (("layers", layers), ("attention_heads", 4), ("ffn_dim", 128))
        },
        **{"max_position_embeddings": 128, "bos_token_id": 2, "eos_token_id": 3, "decoder_start_token_id": 3},
    }
    t5 = {"d_model": 64, "num_layers": layers, "num_heads": 4, "d_kv": 16, "d_ff": 128, "decoder_start_token_id": 0}
    # an image of 16 x 16 pixels is 4 patches
    vit = {
        **{name: size for name, size in sizes.items() if name != "max_position_embeddings"},
        "image_size": 16,
        "patch_size": 8,
    }
    classes: dict[str, tuple[type[PreTrainedConfig], dict[str, Any]]] = {
        "bert": (BertConfig, sizes),
        "minilm": (BertConfig, {**sizes, "num_hidden_layers": max(layers, 3)}),
        "roberta": (RobertaConfig, {**sizes, "bos_token_id": 2, "eos_token_id": 3}),
        "distilbert": (DistilBertConfig, distilbert),
        "llama": (LlamaConfig, grouped),
        "qwen2": (Qwen2Config, grouped),
        # a head size of its own, so that not every kind has hidden_size == heads * head_dim
        "qwen3": (Qwen3Config, {**grouped, "head_dim": 32}),
        "mistral": (MistralConfig, {**grouped, "head_dim": 16, "sliding_window": None}),
        "gpt2": (GPT2Config, {**gpt2, "bos_token_id": 2, "eos_token_id": 3}),
        "t5": (T5Config, {**t5, "eos_token_id": 3}),
        "bart": (BartConfig, bart),
        "vit": (ViTConfig, vit),
    }
    config_class, fields = classes[kind]
    texts = {} if kind in VISION else {"vocab_size": vocab_size, "pad_token_id": 0}
    return config_class(**{**texts, "num_labels": num_labels, **fields, **more})


def tiny_model(kind: str, task: str | None = None, seed: int = 0, **config: Any) -> PreTrainedModel:
    """A random model in eval mode. `task`: a key of `TASKS`; None: what the kind is made for.

    DistilBERT has no causal head: a ValueError.
    `config` goes to the config: `layers=4, num_labels=2, vocab_size=200, hidden_dropout_prob=0.0`, ...
    """
    task = task or MADE_FOR[kind]
    auto = TASKS[task]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        made = tiny_config(kind, **config)
        if task == "causal-lm" and kind in ENCODERS:
            made.is_decoder = True
        model = auto.from_config(made)
        with torch.no_grad():  # fresh biases are zero and fresh norms one, which would hide mistakes
            for parameter in model.parameters():
                if parameter.dim() == 1:
                    parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.eval()


def tiny_tokenizer(vocab_words: Iterable[str] = WORDS, max_length: int = 128) -> PreTrainedTokenizerFast:
    """A fast word-level tokenizer: [PAD] 0, [UNK] 1, [CLS] 2, [SEP] 3, [MASK] 4, then the words; `[CLS] text [SEP]`."""
    vocab = {word: index for index, word in enumerate(dict.fromkeys([*SPECIAL, *vocab_words]))}
    tokenizer = Tokenizer(WordLevel(vocab, unk_token="[UNK]"))
    tokenizer.normalizer = Lowercase()
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.post_processor = TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", vocab["[CLS]"]), ("[SEP]", vocab["[SEP]"])],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_max_length=max_length,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
    )


def tiny_text(topic: str, rng: random.Random, words: int = 12) -> str:
    """A third of the words tell the topic, the rest is filler common to all."""
    return " ".join(rng.choice(TOPICS[topic] if rng.random() < 0.34 else FILLER) for _ in range(words))


def tiny_texts(folder: Path, each: int = 40, topics: Iterable[str] = tuple(TOPICS), seed: int = 0) -> Path:
    """Write `folder/<topic>/000.txt` ...: `each` distinct texts of 6 to 20 words a topic; the words tell it."""
    rng = random.Random(seed)
    for topic in topics:
        (folder / topic).mkdir(parents=True, exist_ok=True)
        texts: dict[str, None] = {}
        while len(texts) < each:
            # the first word is always of the topic: no text is without a sign
            texts[f"{rng.choice(TOPICS[topic])} {tiny_text(topic, rng, rng.randint(5, 19))}"] = None
        for number, text in enumerate(texts):
            (folder / topic / f"{number:03d}.txt").write_text(text, encoding="utf-8")
    return folder


def tiny_images(folder: Path, each: int = 12, colours: Iterable[str] = ("blue", "green", "red"), seed: int = 0) -> Path:
    """Write `folder/<colour>/000.png` ...: `each` distinct noisy images of 20 x 24 pixels a colour; the colour tells it."""
    for number, colour in enumerate(colours):
        (folder / colour).mkdir(parents=True, exist_ok=True)
        rng = np.random.default_rng((seed, number))
        for index in range(each):
            pixels = rng.integers(0, 100, (20, 24, 3))
            pixels[..., ("red", "green", "blue").index(colour)] += 150
            Image.fromarray(pixels.astype(np.uint8)).save(folder / colour / f"{index:03d}.png")
    return folder


def tiny_image_processor() -> ViTImageProcessorPil:
    """To 16 x 16 pixels, as the tiny ViT wants them."""
    return ViTImageProcessorPil(size={"height": 16, "width": 16})


def tiny_checkpoint(folder: Path, kind: str = "bert", task: str | None = None, **config: Any) -> Path:
    """A tiny model and its tokenizer or image processor saved together, as `from_pretrained` wants them."""
    tiny_model(kind, task, **config).save_pretrained(folder)
    (tiny_image_processor() if kind in VISION else tiny_tokenizer()).save_pretrained(folder)
    return folder
