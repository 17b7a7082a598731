"""What distillation is tested on: a tiny model without dropout and rows to train on, for every kind of task."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils.data import Dataset
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertForMaskedLM,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertForTokenClassification,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
    WhisperConfig,
    WhisperForConditionalGeneration,
)

from hfcompress.checkpoint.sentence_head import SentenceHead

VOCAB = 60
SIZES = {"vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


def _bert(head: Callable[..., Any], **more: Any) -> Any:
    return head(
        BertConfig(**{**SIZES, **NO_DROPOUT, "pad_token_id": 0, "num_labels": 3, "attn_implementation": "eager", **more})
    )


def _llama(**more: Any) -> Any:
    fields = {**SIZES, "num_key_value_heads": 2, "pad_token_id": 0, "attn_implementation": "eager", **more}
    return LlamaForCausalLM(LlamaConfig(**fields))


def _t5(**more: Any) -> Any:
    fields = {"vocab_size": VOCAB, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "dropout_rate": 0.0}
    fields |= {"decoder_start_token_id": 0, "pad_token_id": 0, "attn_implementation": "eager"}
    return T5ForConditionalGeneration(T5Config(**{**fields, **more}))


def _bart(**more: Any) -> Any:
    sizes = {
        f"{side}_{name}": value
        for side in ("encoder", "decoder")
        for name, value in {"layers": 2, "attention_heads": 4, "ffn_dim": 48}.items()
    }
    fields = {"vocab_size": VOCAB, "d_model": 32, "dropout": 0.0, "pad_token_id": 0, "decoder_start_token_id": 2, **sizes}
    fields |= {"bos_token_id": 2, "eos_token_id": 3, "forced_eos_token_id": None, "max_position_embeddings": 64}
    return BartForConditionalGeneration(BartConfig(**{**fields, "attn_implementation": "eager", **more}))


def _gpt2(**more: Any) -> Any:
    fields = {"vocab_size": VOCAB, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_inner": 48, "n_positions": 64, "pad_token_id": 0}
    still = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "bos_token_id": 2, "eos_token_id": 3}
    return GPT2LMHeadModel(GPT2Config(**{**fields, **still, "attn_implementation": "eager", **more}))


def _whisper(**more: Any) -> Any:
    fields = {"vocab_size": VOCAB, "d_model": 32, "num_mel_bins": 8, "max_source_positions": 12, "max_target_positions": 16}
    fields |= {
        f"{side}_{name}": value
        for side in ("encoder", "decoder")
        for name, value in {"layers": 2, "attention_heads": 4, "ffn_dim": 48}.items()
    }
    fields |= {"dropout": 0.0, "pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3, "decoder_start_token_id": 2}
    return WhisperForConditionalGeneration(WhisperConfig(**{**fields, "attn_implementation": "eager", **more}))


def _vit(**more: Any) -> Any:
    sizes = {name: value for name, value in SIZES.items() if name != "vocab_size"}
    fields = {**sizes, **NO_DROPOUT, "image_size": 16, "patch_size": 8, "num_labels": 3, "attn_implementation": "eager", **more}
    return ViTForImageClassification(ViTConfig(**fields))


def _embedder(**more: Any) -> Any:
    from sentence_transformers.sentence_transformer.modules import Pooling

    model = _bert(BertModel, **more)
    SentenceHead({"1_Pooling": Pooling(model.config.hidden_size, "mean")}, {}).attach(model)
    return model


def texts(count: int, seed: int, length: int = 10) -> dict[str, torch.Tensor]:
    """Right-padded ids of lengths from 4 to `length`; padding is 0."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(5, VOCAB, (count, length), generator=generator)
    mask = torch.arange(length)[None] < torch.randint(4, length + 1, (count, 1), generator=generator)
    return {"input_ids": ids * mask, "attention_mask": mask.long()}


def _classified(count: int, seed: int) -> dict[str, torch.Tensor]:
    return {**texts(count, seed), "labels": torch.randint(0, 3, (count,), generator=torch.Generator().manual_seed(seed + 1))}


def _several(count: int, seed: int) -> dict[str, torch.Tensor]:
    labels = torch.randint(0, 2, (count, 3), generator=torch.Generator().manual_seed(seed + 1)).float()
    return {**texts(count, seed), "labels": labels}


def _number(count: int, seed: int) -> dict[str, torch.Tensor]:
    return {**texts(count, seed), "labels": torch.randn(count, generator=torch.Generator().manual_seed(seed + 1))}


def _tagged(count: int, seed: int) -> dict[str, torch.Tensor]:
    given = texts(count, seed)
    tags = torch.randint(0, 3, given["input_ids"].shape, generator=torch.Generator().manual_seed(seed + 1))
    return {**given, "labels": tags.masked_fill(given["attention_mask"] == 0, -100)}


def _masked(count: int, seed: int) -> dict[str, torch.Tensor]:
    given = texts(count, seed)
    chosen = torch.rand(given["input_ids"].shape, generator=torch.Generator().manual_seed(seed + 1)) < 0.4
    chosen[:, 0] = True
    labels = given["input_ids"].masked_fill(~(chosen & given["attention_mask"].bool()), -100)
    return {**given, "input_ids": given["input_ids"].masked_fill(labels != -100, 4), "labels": labels}


def _continued(count: int, seed: int) -> dict[str, torch.Tensor]:
    given = texts(count, seed)
    return {**given, "labels": given["input_ids"].masked_fill(given["attention_mask"] == 0, -100)}


def _translated(count: int, seed: int) -> dict[str, torch.Tensor]:
    target = texts(count, seed + 1, 7)
    return {**texts(count, seed), "labels": target["input_ids"].masked_fill(target["attention_mask"] == 0, -100)}


def _answered(count: int, seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed + 1)
    start = torch.randint(0, 2, (count,), generator=generator)
    return {
        **texts(count, seed),
        "start_positions": start,
        "end_positions": start + torch.randint(0, 2, (count,), generator=generator),
    }


def _heard(count: int, seed: int) -> dict[str, torch.Tensor]:
    sounds = torch.randn(count, 8, 24, generator=torch.Generator().manual_seed(seed))
    return {"input_features": sounds, "labels": _translated(count, seed)["labels"]}


def _pictures(count: int, seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, 3, (count,), generator=generator)
    return {"pixel_values": torch.randn(count, 3, 16, 16, generator=generator), "labels": labels}


# A name to (makes a model from config fields, makes so many rows from a seed).
LESSONS: dict[str, tuple[Callable[..., PreTrainedModel], Callable[[int, int], dict[str, torch.Tensor]]]] = {
    "sequence": (lambda **more: _bert(BertForSequenceClassification, **more), _classified),
    "several-labels": (
        lambda **more: _bert(BertForSequenceClassification, problem_type="multi_label_classification", **more),
        _several,
    ),
    "number": (lambda **more: _bert(BertForSequenceClassification, **{**more, "num_labels": 1}), _number),
    "tokens": (lambda **more: _bert(BertForTokenClassification, **more), _tagged),
    "masked-lm": (lambda **more: _bert(BertForMaskedLM, **more), _masked),
    "causal-lm": (_llama, _continued),
    "gpt2": (_gpt2, _continued),
    "whisper": (_whisper, _heard),
    "t5": (_t5, _translated),
    "bart": (_bart, _translated),
    "answers": (lambda **more: _bert(BertForQuestionAnswering, **{**more, "num_labels": 2}), _answered),
    "images": (_vit, _pictures),
    "embeddings": (_embedder, texts),
}


def pupil(name: str, seed: int = 0, **config: Any) -> Any:
    """A random model in train mode, without dropout."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LESSONS[name][0](**config)
        with torch.no_grad():  # larger than fresh weights: a loss of 1e-9 would prove nothing
            for parameter in model.parameters():
                parameter.mul_(2.0) if parameter.dim() > 1 else parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.train()


def batch(name: str, count: int = 8, seed: int = 0) -> dict[str, torch.Tensor]:
    """`count` rows in one batch; "sequence-2" is other data of the same sort."""
    first = name.removesuffix("-2")
    return LESSONS[first][1](count, seed + (100 if first != name else 0))


def padded(given: dict[str, torch.Tensor], more: int) -> dict[str, torch.Tensor]:
    """The same batch, so many positions longer."""
    fill = {"labels": -100}
    return {
        key: torch.nn.functional.pad(value, (0, more), value=fill.get(key, 0)) if value.dim() == 2 else value
        for key, value in given.items()
    }


class Rows(Dataset):
    def __init__(self, name: str, count: int = 8, seed: int = 0) -> None:
        given = batch(name, count, seed)
        self._rows = [{key: value[row] for key, value in given.items()} for row in range(count)]

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, row: int) -> dict[str, torch.Tensor]:
        return self._rows[row]
