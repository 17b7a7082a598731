from __future__ import annotations

from collections.abc import Hashable, Iterable
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from datasets import Dataset
from pydantic import Field, PositiveInt, PrivateAttr, model_validator
from torch import Tensor, nn
from transformers import AutoModel, PreTrainedModel

from hfcompress.checkpoint.errors import CompressionError
from hfcompress.checkpoint.sentence_head import SentenceHead, read_sentence_head
from hfcompress.tasks.columns import as_texts, filled, find_column, find_texts, missing, number_labels
from hfcompress.tasks.data import choose
from hfcompress.tasks.metrics import NEIGHBOUR_METRICS, PARTNER_METRICS, VALUE_METRICS, Table
from hfcompress.tasks.pretrained import load_config, locate
from hfcompress.tasks.scoring import Decision
from hfcompress.tasks.texts import TextTask

SCORES = ("score", "similarity_score", "similarity")
ROWS = 1024
"""Similarities are made of so many texts at a time with all."""
PAIRS = (("anchor", "positive"), ("query", "passage"), ("query", "answer"))
"""Beside those that `find_texts` knows."""


class SentenceEmbeddings(TextTask):
    """An embedding a text, as sentence-transformers makes it; `SentenceTransformer(folder)` opens what is saved.

    Of texts alone, scored by how often a text's nearest neighbour is the one the original finds; of pairs, by how often the
    first text's nearest is its partner; of pairs with scores, by the correlation of their cosines with these.
    """

    auto_class = AutoModel
    learns_alone: ClassVar[bool] = False

    text_pair_column: str | None = Field(default=None, description="the column of the second texts; guessed by default")
    score_column: str | None = Field(
        default=None, description=f"the column of how alike the two are; guessed by default ({', '.join(SCORES)})"
    )
    max_length: PositiveInt | None = Field(
        default=None, description="tokens a text is cut to; by default what sentence-transformers cuts it to"
    )
    metrics: list[str] = Field(
        default=["agreement"],
        min_length=1,
        description="what to score; by default agreement, of pairs recall_at_1, of scored pairs spearman",
    )
    name: Literal["sentence-embeddings"] = "sentence-embeddings"

    _sentence_head: Any = PrivateAttr(None)
    _kind: Literal["texts", "pairs", "scores"] = PrivateAttr("texts")
    _truth: Any = PrivateAttr(None)

    @model_validator(mode="after")
    def _scores_pairs(self) -> SentenceEmbeddings:
        if self.score_column and self.text_column and not self.text_pair_column:
            raise ValueError("score_column tells how alike two texts are, and text_pair_column names no second one; name it")
        return self

    # ---------------------------------------------------------------- the model

    def load_processor(self, path: str) -> Any:
        """The tokenizer, and beside it what comes after the encoder."""
        self._sentence_head = self._head_at(path)
        return super().load_processor(path)

    def load_model(self, path: str, **kwargs: Any) -> PreTrainedModel:
        """See `Task.load_model`; it answers with embeddings (batch, width) as `logits`."""
        model = super().load_model(path, **kwargs)
        if isinstance(model, PreTrainedModel):  # an export tells embeddings as it is
            self._head_at(path).attach(model)
        return model

    def _head_at(self, path: str) -> SentenceHead:
        config = load_config(path)
        if config.is_encoder_decoder:
            raise CompressionError(
                f"model {path!r}: a {config.model_type} is an encoder-decoder, and sentence-embeddings are made by an encoder; "
                f"choose another checkpoint."
            )
        return read_sentence_head(locate(path)[0], config.get_text_config().hidden_size)

    @property
    def example_length(self) -> int:
        return self._limit(self.max_length or self._sentence_head.max_length or 10**9)

    # ---------------------------------------------------------------- data

    def _texts(self, rows: Dataset) -> list[str]:
        if self.text_column is None and self.text_pair_column is None:
            for both in PAIRS:
                if set(both) <= set(rows.column_names):
                    return list(both)
        return find_texts(self.text_column, self.text_pair_column, rows.column_names, self.dataset)

    def _used(self, rows: Dataset) -> list[str]:
        """The texts, and the scores where there are any: in a column `label` too, if it holds fractions."""
        texts, columns = self._texts(rows), rows.column_names
        is_fraction = "float" in str(getattr(rows.features.get("label"), "dtype", ""))
        guesses = [*SCORES, *(["label"] if is_fraction else [])]
        scored = self.score_column is not None or any(name in columns and name not in texts for name in guesses)
        if self.score_column is not None and len(texts) < 2:
            raise CompressionError(
                f"dataset {self.dataset!r}: score_column tells how alike two texts are, and only {texts[0]!r} was found; name "
                f"the second one with text_pair_column."
            )
        if len(texts) < 2 or not scored:
            return texts
        return [*texts, find_column("score_column", self.score_column, guesses, columns, self.dataset, texts)]

    def _clean(self, rows: Dataset) -> Dataset:
        """`first`, maybe `second`, and maybe `label`, without rows that lack one."""
        texts = self._texts(rows)
        used = self._used(rows)
        rows = as_texts(rows.select_columns(used), texts, "text_column", self.dataset)
        columns = {name: rows[column][:] for name, column in zip(("first", "second"), texts, strict=False)}
        if len(used) > len(texts):
            columns["label"] = rows[used[-1]][:]
        hidden = missing(columns["label"], rows.features[used[-1]]) if "label" in columns else [False] * len(rows)
        sides = zip(*(columns[name] for name in ("first", "second") if name in columns), strict=True)
        values = enumerate(zip(hidden, sides, strict=True))
        given = [place for place, (gone, parts) in values if not gone and all(map(filled, parts))]
        return Dataset.from_dict({name: [column[place] for place in given] for name, column in columns.items()})

    def _keys(self, rows: Dataset) -> Iterable[Hashable]:
        return zip(*(rows[name][:] for name in _sides(rows)), strict=True)

    def _read(self) -> dict[str, Dataset]:
        rows = super()._read()
        columns = next(iter(rows.values())).column_names
        self._kind = "scores" if "label" in columns else "pairs" if "second" in columns else "texts"
        return number_labels(rows, self.dataset, "a score is a number", "score_column") if self._kind == "scores" else rows

    def _prepare(self, train: Dataset, held_out: Dataset, path: str) -> None:
        processor, length, wanted = self.processor, self.example_length, self._wanted()
        written = self._sentence_head.written

        def tokens(rows: dict[str, list]) -> dict[str, list]:
            encoded = processor(rows["text"], truncation=True, max_length=length)
            return {name: values for name, values in encoded.items() if name in wanted}

        def lines(rows: Dataset) -> Dataset:
            """All first texts, then all second ones."""
            found = [written(text) for side in _sides(rows) for text in rows[side][:]]
            return self._encoded(Dataset.from_dict({"text": found}), None, tokens)

        kept = choose(held_out, self.max_eval_samples, self.seed)
        if self._kind != "scores" and len(kept) < 3:
            what = "pair" if self._kind == "pairs" else self.unit
            raise CompressionError(
                f"dataset {self.dataset!r}: {len(kept)} {what}s to score on leave no choice of a nearest one; give more."
            )
        self._train, self._eval = lines(choose(train, self.max_train_samples, self.seed)), lines(kept)
        self._truth = self._told(kept)

    def _told(self, kept: Dataset) -> np.ndarray:
        """What is right: scores; of pairs, which second text is the partner, the first of equal ones."""
        if self._kind == "scores":
            scores = np.asarray(kept["label"][:], dtype=np.float64)
            if not np.isfinite(scores).all():
                raise CompressionError(
                    f"dataset {self.dataset!r}: a score to judge by is infinite; mend it, or name another one with "
                    f"score_column."
                )
            return scores
        first: dict[str, int] = {}
        texts = kept["second"][:] if self._kind == "pairs" else []
        return np.array([first.setdefault(text, place) for place, text in enumerate(texts)], dtype=np.int64)

    # ---------------------------------------------------------------- scoring

    @property
    def scored_by(self) -> list[str]:
        """The metrics: those asked for, or those that fit the data."""
        if "metrics" in self.model_fields_set:
            return super().scored_by
        return {"texts": ["agreement"], "pairs": ["recall_at_1"], "scores": ["spearman", "pearson"]}[self._kind]

    def _table(self) -> Table:
        return {"texts": NEIGHBOUR_METRICS, "pairs": PARTNER_METRICS, "scores": VALUE_METRICS}[self._kind]

    def _decide(self, logits: Tensor, labels: Tensor) -> Decision:
        return {"embeddings": logits.float().cpu().numpy()[None]}

    def _predict(self, model: nn.Module, data: Any) -> dict[str, np.ndarray]:
        embeddings = torch.from_numpy(super()._predict(model, data)["embeddings"])
        unit = nn.functional.normalize(embeddings, dim=-1)
        if self._kind == "texts":
            said, truth = nearest(unit, unit, but_itself=True), np.zeros(len(unit), dtype=np.int64)
        else:
            first, second = unit.chunk(2)
            if self._kind == "pairs":
                said, truth = self._truth[nearest(first, second)], self._truth
            else:
                said, truth = (first * second).sum(-1).double().numpy(), self._truth
        ones = np.ones(len(said), dtype=np.int64)
        return {"predictions": said, "references": truth, "nll": np.zeros(len(said)), "tokens": ones}


def _sides(rows: Dataset) -> list[str]:
    return [name for name in ("first", "second") if name in rows.column_names]


def nearest(queries: Tensor, among: Tensor, but_itself: bool = False) -> np.ndarray:
    """(queries,) int64: the place of the largest dot product with `among`; the first of equals. NaN is never the nearest."""
    found = []
    for start in range(0, len(queries), ROWS):
        alike = torch.nan_to_num(queries[start : start + ROWS] @ among.T, nan=-torch.inf)
        if but_itself:
            alike.diagonal(start).fill_(-torch.inf)
        found.append(alike.argmax(-1))
    return torch.cat(found).numpy()
