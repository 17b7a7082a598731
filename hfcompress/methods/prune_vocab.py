"""Vocabulary pruning as a method: which tokens stay, cut from model and tokenizer at once."""

from __future__ import annotations

import hashlib
import logging
from collections import Counter
from collections.abc import Iterable
from contextlib import AbstractContextManager
from typing import Any, ClassVar, Literal

from pydantic import Field, PositiveInt, model_validator
from torch import nn

from hfcompress.checkpoint.errors import CompressionError
from hfcompress.methods.base import Method, Tick, leave_loadable
from hfcompress.methods.riding import check_together
from hfcompress.surgery.modules import check_editable, restored_on_error
from hfcompress.surgery.vocabulary.embeddings import fixed_tokens, keep_tokens, named_tokens, vocabulary_size
from hfcompress.surgery.vocabulary.tokenizer import Vocabulary, check_same, counted, tokenizer_of

log = logging.getLogger("hfcompress")


class PruneVocab(Method):
    """Leave out the tokens that your texts don't use, from the model and its tokenizer at once.

    Needs: a fast tokenizer, and a model that reads tokens. In a script: `PruneVocab(texts).run(model, tokenizer)` changes both
    in place, before you tokenise.
    Buys: the rows of the embeddings and of the language-model head that go; a plain transformers model and tokenizer. Texts
    whose tokens all stay get the same tokens, and a classifier the same answers.
    Costs: other texts are cut into smaller tokens that are left, which the model knows less well; a language model can't write
    the tokens that went. Perplexity is per token: compare it only where the tokens are the same.
    Paper: Abdaoui et al. 2020, Load What You Need (arXiv 2010.05609)
    """

    edits: ClassVar[frozenset[str]] = frozenset({"tokens"})
    rides: ClassVar[bool] = False
    tag: ClassVar[str] = "pruning"

    corpus: str | list[str] | None = Field(
        default=None,
        description="Texts whose tokens stay: a list of them, or a data set as a task names it, all splits and columns; by "
        "default the tokens that the task trains on. What only texts to score on hold is then cut into smaller tokens.",
    )
    split: Literal["train", "all"] = Field(
        default="train",
        description="Whose tokens stay if there is no corpus: of the data to train on, or of those to score on too; the score "
        "then doesn't tell how new words fare.",
    )
    tokens: PositiveInt | None = Field(default=None, description="So many tokens at most: the most frequent.")
    keep: float | None = Field(default=None, gt=0, lt=1, description="The same as a share of all tokens.")
    min_count: PositiveInt = Field(default=1, description="A token stays that occurs so often.")
    always: list[str] = Field(
        default=[], description="Tokens that stay in any case, as the vocabulary writes them (##ing, Ġthe)."
    )

    @model_validator(mode="after")
    def _one_budget(self) -> PruneVocab:
        if self.tokens is not None and self.keep is not None:
            raise ValueError("tokens and keep both say how many tokens stay; give one of them")
        if isinstance(self.corpus, list) and not any(text.strip() for text in self.corpus):
            raise ValueError("corpus has no text; leave it out to keep the tokens of the training data, or give some texts")
        if self.corpus is not None and self.split != "train":
            raise ValueError("split chooses among the task's own data, and corpus names others; give one of them")
        return self

    @property
    def label(self) -> str:
        budget = self.tokens if self.tokens is not None else self.keep
        return self.key() if budget is None else f"{self.key()} {budget}"

    def applied(self, model: nn.Module, task: Any) -> AbstractContextManager[Tick | None]:
        check_together([self])
        raise NotImplementedError

    def run(self, model: nn.Module, task: Any) -> None:
        """`task`: a Task, whose data are tokenised anew; or a tokenizer, or what has one as `processor`, changed in place."""
        check_editable(model, self.key())
        processor = task if hasattr(task, "get_vocab") else getattr(task, "processor", None)
        tokenizer = tokenizer_of(processor)
        total, vocabulary = vocabulary_size(model), Vocabulary(tokenizer)
        if (most := max(vocabulary.ids.values()) + 1) > total:
            raise CompressionError(
                f"prune_vocab: the tokenizer has {most} tokens and the model {total}; give the tokenizer that belongs to it."
            )
        texts = self._texts()
        counts = self._counts(task, tokenizer, texts)
        keep = sorted(self._kept(model, vocabulary, counts, total))
        if len(keep) == total:
            raise CompressionError(
                f"prune_vocab: the texts use all {total} tokens, or these must stay, and nothing would be cut; raise "
                f"min_count, or set tokens."
            )
        known = set(vocabulary.ids.values())
        new = vocabulary.smaller([index for index in keep if index in known])
        check_same(tokenizer, new, texts)
        with restored_on_error(model):
            keep_tokens(model, keep)
        if hasattr(task, "adopt"):
            exact = self.corpus is None and counts.keys() <= set(keep)
            was = _digest(task.data_tokens()) if exact else b""
            task.adopt(new)
            if exact and _digest(keep[token] for token in task.data_tokens()) != was:
                raise CompressionError(
                    "prune_vocab: the smaller tokenizer cuts the training data into other tokens; this is a fault of "
                    "hfcompress, please report it with the tokenizer."
                )
        else:
            _become(processor, tokenizer, new)
        leave_loadable(model, [self])
        log.info("prune_vocab: %d of %d tokens stay", len(keep), total)

    def _texts(self) -> list[str]:
        if isinstance(self.corpus, str):
            from hfcompress.tasks.data import read_texts  # here, as importing datasets takes its time

            return list(read_texts(self.corpus))
        return list(self.corpus or ())

    def _counts(self, task: Any, tokenizer: Any, texts: list[str]) -> Counter[int]:
        if self.corpus is not None:
            return counted(tokenizer, texts)
        if not hasattr(task, "data_tokens"):
            raise CompressionError(
                "prune_vocab: there is no corpus to choose tokens by; give one as corpus (texts, a file, a folder, a data "
                "set), or list prune_vocab in a recipe, which has training data."
            )
        return Counter(task.data_tokens(self.split))

    def _kept(self, model: Any, vocabulary: Vocabulary, counts: Counter[int], total: int) -> set[int]:
        names = {index: token for token, index in vocabulary.ids.items()}
        if unknown := next((token for token in self.always if token not in vocabulary.ids), None):
            raise CompressionError(
                f"prune_vocab: always: {unknown!r} is no token of the tokenizer; possible are tokens as it writes them, see "
                f"tokenizer.tokenize(...)."
            )
        found: set[int] = named_tokens(model) | set(range(fixed_tokens(model)))
        for index in vocabulary.needed() | {vocabulary.ids[token] for token in self.always}:
            found |= vocabulary.closed(index, names[index])
        most = self.tokens if self.tokens is not None else int(self.keep * total) if self.keep is not None else total
        if len(found) > most:
            raise CompressionError(
                f"prune_vocab: at most {most} tokens are to stay, and {len(found)} must (special and added tokens, single "
                f"characters or bytes, what always names); allow more."
            )
        for index in sorted(counts, key=lambda index: (-counts[index], index)):
            if counts[index] < self.min_count or len(found) == most:
                break  # the rest is rarer still, and every token wants room
            more = vocabulary.closed(index, names[index]) - found
            if len(found) + len(more) <= most:
                found |= more
        return found


def _digest(tokens: Iterable[int]) -> bytes:
    digest = hashlib.blake2b(digest_size=16)
    for token in tokens:
        digest.update(token.to_bytes(4, "little"))
    return digest.digest()


def _become(processor: Any, tokenizer: Any, new: Any) -> None:
    """The tokenizer in place, and the ids that a processor around it notes: whoever holds them goes on with the new ones."""
    if processor is not tokenizer:
        old, ids = {index: token for token, index in tokenizer.get_vocab().items()}, new.get_vocab()
        for key, value in vars(processor).items():
            if key.endswith("_token_id") and type(value) is int and value in old:
                setattr(processor, key, ids[old[value]])
    vars(tokenizer).clear()
    vars(tokenizer).update(vars(new))
