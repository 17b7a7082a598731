"""Vocabulary pruning of a fast tokenizer: fewer tokens, and every text made of those that stay is cut into the very same.

Why it does, kind by kind; in each, what is taken away never won where only kept tokens came out:
- WordPiece takes the longest token that fits: the longest of all is the longest of some.
- Unigram takes the best path: the best of all paths is the best of some. What it gives to an unknown character hangs on the
  lowest score of all, so the token of that score stays; so do single characters, beside which nothing is unknown.
- BPE applies the merge of the lowest rank until none is left. Symbols only grow, so no merge ever crosses the border of a token
  that came out: inside, it was made as if it stood alone. Hence `closed`: if each token on the way to a kept one is kept too,
  the merge that was applied is there still, and was the lowest of more.
- WordLevel looks words up.
"""

from __future__ import annotations

import copy
import json
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import islice, pairwise
from typing import Any

from tokenizers import Tokenizer
from transformers import AutoTokenizer

from hfcompress.checkpoint.errors import CompressionError

KINDS = ("WordPiece", "BPE", "Unigram", "WordLevel")
BYTES = {f"<0x{byte:02X}>" for byte in range(256)}
BATCH = 1000


def tokenizer_of(processor: Any) -> Any:
    """The tokenizer of a processor, which may be one itself. CompressionError for one that can't be cut."""
    found = processor if hasattr(processor, "get_vocab") else getattr(processor, "tokenizer", None)
    if found is None:
        what = "there is no tokenizer" if processor is None else f"a {type(processor).__name__} has no tokenizer"
        raise CompressionError(
            f"prune_vocab: {what}, and tokens can't be chosen; possible are models of texts; give their tokenizer, as in "
            f"run(model, tokenizer), or leave prune_vocab out."
        )
    backend = getattr(found, "backend_tokenizer", None)
    if not isinstance(backend, Tokenizer):
        raise CompressionError(
            f"prune_vocab: {type(found).__name__} is written in Python, and its vocabulary can't be cut; possible are fast "
            f"tokenizers (tokenizer.json); load one with AutoTokenizer, or leave prune_vocab out."
        )
    kind = type(backend.model).__name__
    if kind not in KINDS:
        raise CompressionError(
            f"prune_vocab: {type(found).__name__} has a model of the kind {kind}; possible are {', '.join(KINDS)}; "
            f"leave prune_vocab out."
        )
    return found


class Vocabulary:
    """What a fast tokenizer's tokens are made of: `ids` of all tokens, `needed` ones, and those `closed` under merging."""

    def __init__(self, tokenizer: Any) -> None:
        self.state: dict[str, Any] = json.loads(tokenizer.backend_tokenizer.to_str())
        self.ids: dict[str, int] = tokenizer.get_vocab()
        self._tokenizer = tokenizer
        model = self.state["model"]
        self._prefix: str = model.get("continuing_subword_prefix") or ""
        self._suffix: str = model.get("end_of_word_suffix") or ""
        pairs = [tuple(pair.split(" ") if isinstance(pair, str) else pair) for pair in model.get("merges", ())]
        self._ranks: dict[tuple[str, ...], int] = {}
        for rank, pair in enumerate(pairs):
            self._ranks[pair] = rank  # of a pair that is listed twice the last counts, as in the library

    def needed(self) -> set[int]:
        """Ids of what must stay whatever the texts: special and added tokens, the unknown token, and what spells the rest."""
        model = self.state["model"]
        found = {token["id"] for token in self.state["added_tokens"]}
        found |= {
            self.ids[token] for token in [model.get("unk_token"), *self._tokenizer.all_special_tokens] if token in self.ids
        }
        if model["type"] == "Unigram":
            # Classes such as XLMRobertaTokenizer know the unknown token by its place.
            found |= set(range((model["unk_id"] if model["unk_id"] is not None else -1) + 1))
            scores = [score for _, score in model["vocab"]]
            found.add(scores.index(min(scores)))
        if model["type"] == "WordLevel":
            return found
        bytes_spell = bool(model.get("byte_fallback")) and self.ids.keys() >= BYTES
        if bytes_spell:
            found |= {self.ids[byte] for byte in BYTES}
        if not bytes_spell or model["type"] == "Unigram":
            found |= {index for token, index in self.ids.items() if len(self._letters(token)) == 1}
        return found

    def _letters(self, token: str) -> list[str]:
        """The symbols that BPE starts from: characters, with the mark of a word's inside or end on them."""
        inside = bool(self._prefix) and token.startswith(self._prefix) and len(token) > len(self._prefix)
        ended = bool(self._suffix) and token.endswith(self._suffix) and len(token) > len(self._suffix)
        body = token[len(self._prefix) if inside else 0 : len(token) - (len(self._suffix) if ended else 0)]
        letters = [(self._prefix if number or inside else "") + letter for number, letter in enumerate(body)]
        return [*letters[:-1], letters[-1] + self._suffix] if ended else letters

    def closed(self, index: int, token: str) -> set[int]:
        """The ids of a token and of all that it is merged from, on the way that encoding takes."""
        symbols, found = self._letters(token) if self._ranks else [], {index}
        while len(symbols) > 1:
            pairs = [(self._ranks[pair], at) for at, pair in enumerate(pairwise(symbols)) if pair in self._ranks]
            if not pairs:
                return {index}  # no merge leads there: an added token, or a whole word that is looked up (ignore_merges)
            _, at = min(pairs)
            found |= {self.ids[symbol] for symbol in symbols[at : at + 2]}
            symbols[at : at + 2] = [symbols[at] + symbols[at + 1][len(self._prefix) :]]
        return found

    def smaller(self, keep: list[int]) -> Any:
        """A copy of the tokenizer with these tokens (ascending ids), counted from 0 in their order."""
        place = {old: new for new, old in enumerate(keep)}
        expected = {token: place[index] for token, index in self.ids.items() if index in place}
        state = self._cut(place)
        try:
            backend = Tokenizer.from_str(json.dumps(state))
        except Exception as error:  # the library raises bare exceptions
            raise CompressionError(
                f"prune_vocab: the tokenizer can't be built with fewer tokens ({error}); leave it out."
            ) from error
        if backend.get_vocab() != expected:
            wrong = sorted(token for token in expected if backend.token_to_id(token) != expected[token])
            raise CompressionError(
                f"prune_vocab: the tokenizer would count its tokens otherwise than the model ({wrong[:1]} and "
                f"{max(0, len(wrong) - 1)} more), as its ids have gaps; leave prune_vocab out."
            )
        new = copy.deepcopy(self._tokenizer, {id(self._tokenizer._tokenizer): backend})
        new.init_kwargs = {key: _renumbered(key, value, place, self.ids) for key, value in new.init_kwargs.items()}
        for key, value in list(vars(new).items()):
            if key not in ("_tokenizer", "init_kwargs"):
                vars(new)[key] = _renumbered(key, value, place, self.ids)
        if hasattr(new, "_wrap_decode_method_backend_tokenizer"):  # CLIP puts a method of its own on the backend
            new._wrap_decode_method_backend_tokenizer()
        return new

    def _cut(self, place: dict[int, int]) -> dict[str, Any]:
        state = copy.deepcopy({key: value for key, value in self.state.items() if key != "model"})
        state["model"] = model = dict(self.state["model"])  # its large tables are written anew
        if model["type"] == "Unigram":
            model["vocab"] = [entry for index, entry in enumerate(model["vocab"]) if index in place]
            model["unk_id"] = place.get(model["unk_id"])
        else:
            kept = sorted((place[index], token) for token, index in model["vocab"].items() if index in place)
            model["vocab"] = {token: index for index, token in kept}
        if "merges" in model:
            stays, skipped = model["vocab"], len(self._prefix)
            pairs = [pair.split(" ") if isinstance(pair, str) else pair for pair in model["merges"]]
            model["merges"] = [[a, b] for a, b in pairs if a in stays and b in stays and a + b[skipped:] in stays]
        state["added_tokens"] = [{**token, "id": place[token["id"]]} for token in state["added_tokens"] if token["id"] in place]
        if state.get("padding"):
            state["padding"]["pad_id"] = place.get(state["padding"]["pad_id"], 0)
        _renumber_processor(state.get("post_processor"), place)
        return state


def _renumber_processor(state: Any, place: dict[int, int]) -> None:
    """The ids that a post-processor puts around a text."""
    for part in (state or {}).get("processors", ()):
        _renumber_processor(part, place)
    for special in (state or {}).get("special_tokens", {}).values():
        special["ids"] = [place[index] for index in special["ids"]]
    for key in ("sep", "cls"):
        if key in (state or {}):
            state[key] = [state[key][0], place[state[key][1]]]


def _renumbered(name: str, value: Any, place: dict[int, int], ids: dict[str, int]) -> Any:
    """What the Python side of a tokenizer notes of ids: tables of tokens either way, and single ids such as a language's."""
    if isinstance(value, dict) and value and all(type(key) is int and str(token) in ids for key, token in value.items()):
        return {place[index]: token for index, token in value.items() if index in place}
    if isinstance(value, dict) and value and all(ids.get(token, token) == index for token, index in value.items()):
        return {token: place[index] for token, index in value.items() if index in place}
    if type(value) is int and name.endswith(("token_id", "lang_code", "lang_code_id")):
        return place.get(value, value)
    return value


def encoded(tokenizer: Any, texts: Iterable[str]) -> Iterator[tuple[str, Any]]:
    """Each text with its encoding, whole: neither cut to a length nor padded."""
    backend, waiting = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str()), iter(texts)
    backend.no_truncation()
    backend.no_padding()
    while batch := list(islice(waiting, BATCH)):
        yield from zip(batch, backend.encode_batch(batch), strict=True)


def counted(tokenizer: Any, texts: Iterable[str]) -> Counter[int]:
    """How often each token occurs."""
    counts: Counter[int] = Counter()
    for _, encoding in encoded(tokenizer, texts):
        counts.update(encoding.ids)
    return counts


def check_same(old: Any, new: Any, texts: Iterable[str]) -> None:
    """CompressionError unless each text whose tokens all stay is cut into the same tokens, by the new one and by what is read
    back after it was saved."""
    texts, stays = list(texts), new.get_vocab()
    again = _reloaded(new)
    for (text, was), (_, now), (_, then) in zip(encoded(old, texts), encoded(new, texts), encoded(again, texts), strict=True):
        if now.tokens != was.tokens and all(token in stays for token in was.tokens):
            _refuse(text, was.tokens, now.tokens, "")
        if then.ids != now.ids:
            _refuse(text, now.tokens, then.tokens, "once saved and loaded, ")


def _reloaded(tokenizer: Any) -> Any:
    with tempfile.TemporaryDirectory(prefix="hfcompress-tokens-") as folder:
        tokenizer.save_pretrained(folder)
        try:
            again = AutoTokenizer.from_pretrained(folder)
        except Exception as error:  # each class has checks of its own
            raise CompressionError(
                f"prune_vocab: {type(tokenizer).__name__} can't be loaded with fewer tokens ({error}); leave prune_vocab out."
            ) from error
    mine, theirs = tokenizer.get_vocab(), again.get_vocab()
    if mine != theirs or tokenizer.special_tokens_map != again.special_tokens_map:
        wrong = sorted({token for token in {**mine, **theirs} if mine.get(token) != theirs.get(token)})
        raise CompressionError(
            f"prune_vocab: once saved and loaded, {type(tokenizer).__name__} has other tokens ({wrong[:3]}); "
            f"leave prune_vocab out."
        )
    return again


def _refuse(text: str, before: list[str], after: list[str], where: str) -> None:
    at = next((i for i, (a, b) in enumerate(zip(before, after, strict=False)) if a != b), min(len(before), len(after)))
    raise CompressionError(
        f"prune_vocab: {where}the smaller tokenizer cuts {text[:40]!r} into other tokens ({before[at : at + 3]} became "
        f"{after[at : at + 3]}); this is a fault of hfcompress, please report it with the tokenizer."
    )
