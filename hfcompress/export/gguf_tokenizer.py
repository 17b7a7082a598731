"""GGUF's tokenizer: tokens, their types and merges, how texts are cut before, special tokens, the chat template."""

from __future__ import annotations

import json
from typing import Any

from hfcompress.checkpoint.errors import CompressionError, shown

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
"""llama.cpp's types of tokens."""
_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
CUTS = {_WORDS % "{1,3}": "llama-bpe", _WORDS % "": "qwen2"}
"""How a text is cut before bytes are merged: the pattern of a tokenizer to llama.cpp's name of it."""
KNOWN = "byte-level BPE as GPT-2, Llama 3, Qwen2 and 3 and SmolLM have it, and SentencePiece BPE as Llama 2 and Mistral"


def tokenizer_fields(tokenizer: Any, vocabulary: int) -> dict[str, Any]:
    """The fields `tokenizer.*` of a GGUF file, for a table of so many rows; CompressionError where llama.cpp has no such
    tokenizer."""
    told = _backend(tokenizer)
    model = told["model"]
    is_pieces = bool(model.get("byte_fallback"))
    fields: dict[str, Any] = {
        "ggml.model": "llama" if is_pieces else "gpt2",
        "ggml.pre": "default" if is_pieces else _cut(told),
    }
    tokens, types = _tokens(tokenizer, told, vocabulary)
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
    fields |= {"ggml.tokens": tokens, "ggml.token_type": types}
    if is_pieces:
        # what is merged first scores highest: llama.cpp joins the pair whose result scores best, as SentencePiece does
        ranks = {pair.replace(" ", ""): rank for rank, pair in reversed([*enumerate(merges)])}
        fields["ggml.scores"] = [-float(ranks.get(token, 0)) for token in tokens]
        fields["ggml.add_space_prefix"] = _adds_space(tokenizer)
    else:
        fields["ggml.merges"] = merges
    return fields | _special(tokenizer)


def _backend(tokenizer: Any) -> dict[str, Any]:
    """tokenizer.json as a mapping; CompressionError for what is no BPE."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    told = {} if backend is None else json.loads(backend.to_str())
    kind = (told.get("model") or {}).get("type")
    if kind != "BPE":
        raise CompressionError(
            f"export to gguf: its tokenizer is {shown(kind or type(tokenizer).__name__)}, and llama.cpp takes {KNOWN}; another "
            f"format takes any tokenizer."
        )
    return told


def _cut(told: dict[str, Any]) -> str:
    """llama.cpp's name of how texts are cut before bytes are merged."""
    before = told.get("pre_tokenizer") or {}
    parts = before.get("pretokenizers") or [before]
    kinds = [part.get("type") for part in parts]
    patterns = [(part.get("pattern") or {}).get("Regex") for part in parts if part.get("type") == "Split"]
    by_words = parts[-1].get("type") == "ByteLevel" and parts[-1].get("use_regex", True)
    if kinds == ["ByteLevel"] and by_words:
        return "gpt-2"
    if kinds == ["Digits", "ByteLevel"] and by_words and parts[0].get("individual_digits"):
        return "smollm"
    if kinds == ["Split", "ByteLevel"] and not by_words and patterns[0] in CUTS:
        return CUTS[patterns[0]]
    raise CompressionError(
        f"export to gguf: its tokenizer cuts texts by {shown(json.dumps(before), 120)}, for which llama.cpp's name isn't known "
        f"here; known are {', '.join(('gpt-2', 'smollm', *CUTS.values()))}, and SentencePiece BPE."
    )


def _tokens(tokenizer: Any, told: dict[str, Any], vocabulary: int) -> tuple[list[str], list[int]]:
    """Every row's token, and its type; rows without one are unused."""
    added = {one["id"]: one for one in told.get("added_tokens") or []}
    by_id = {index: token for token, index in tokenizer.get_vocab().items()}
    most = max([vocabulary - 1, *by_id])
    if most >= vocabulary:
        raise CompressionError(
            f"export to gguf: its tokenizer has {most + 1} tokens, and the model {vocabulary} rows; the table must be resized."
        )
    tokens, types = [], []
    for index in range(vocabulary):
        token = by_id.get(index)
        tokens.append(f"[PAD{index}]" if token is None else token)
        types.append(_type(token, added.get(index), tokenizer, told))
    return tokens, types


def _type(token: str | None, added: dict[str, Any] | None, tokenizer: Any, told: dict[str, Any]) -> int:
    if token is None:
        return UNUSED
    if told["model"].get("byte_fallback"):
        if token == tokenizer.unk_token:
            return UNKNOWN
        if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
            return BYTE
    if added is not None:
        return CONTROL if added.get("special") else USER_DEFINED
    return NORMAL


def _adds_space(tokenizer: Any) -> bool:
    """Whether a text is read as if it began with a blank."""
    return bool(tokenizer.tokenize("a")[-1:] and tokenizer.tokenize("a")[0].startswith("▁"))


def _special(tokenizer: Any) -> dict[str, Any]:
    names = {"bos": "bos", "eos": "eos", "unk": "unknown", "sep": "seperator", "pad": "padding"}
    ids = {theirs: getattr(tokenizer, f"{ours}_token_id", None) for ours, theirs in names.items()}
    fields: dict[str, Any] = {f"ggml.{name}_token_id": int(value) for name, value in ids.items() if value is not None}
    read = tokenizer("a")["input_ids"]
    fields["ggml.add_bos_token"] = tokenizer.bos_token_id is not None and read[:1] == [tokenizer.bos_token_id]
    fields["ggml.add_eos_token"] = tokenizer.eos_token_id is not None and len(read) > 1 and read[-1] == tokenizer.eos_token_id
    return fields | _chat(tokenizer.chat_template)


def _chat(template: Any) -> dict[str, Any]:
    """One chat template, or several by name, of which `default` is the one that is taken when none is named."""
    named = {"default": template} if isinstance(template, str) else dict(template or {})
    others = [name for name in named if name != "default"]
    fields: dict[str, Any] = {f"chat_template.{name}": named[name] for name in others}
    if others:
        fields["chat_templates"] = others
    return fields | ({"chat_template": named["default"]} if "default" in named else {})
