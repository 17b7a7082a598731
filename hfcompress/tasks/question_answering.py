from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from datasets import Dataset
from pydantic import Field, PositiveInt, PrivateAttr, model_validator
from torch import Tensor, nn
from transformers import AutoModelForQuestionAnswering, PreTrainedConfig

from hfcompress.checkpoint.errors import CompressionError, shown
from hfcompress.tasks.columns import as_texts, filled, find_column
from hfcompress.tasks.data import choose
from hfcompress.tasks.metrics import ANSWER_METRICS, Table
from hfcompress.tasks.pretrained import has_head, load_fast_tokenizer
from hfcompress.tasks.scoring import Decision
from hfcompress.tasks.squad import exactly, overlap
from hfcompress.tasks.texts import TextTask

CONTEXTS = ("context", "passage", "paragraph", "text", "document")
ANSWERS = ("answers", "answer")


class Window(NamedTuple):
    """A context, or a part of a long one, as the model reads it behind its question."""

    example: int
    offsets: list[tuple[int, int] | None]
    """For each token where it stands in the context; None for those of the question, and for special ones."""


class QuestionAnswering(TextTask):
    """The span of a context that answers a question, or none, as in SQuAD; long contexts are read in windows that overlap."""

    auto_class = AutoModelForQuestionAnswering

    text_column: str | None = Field(default=None, description="the column of the contexts; guessed by default")
    question_column: str | None = Field(default=None, description="the column of the questions; question by default")
    answers_column: str | None = Field(
        default=None,
        description="the column of the answers, guessed by default: a text; or texts and where they start, as in SQuAD; an "
        "empty one where the context does not answer",
    )
    max_length: PositiveInt = Field(default=384, description="tokens of a question and a window together")
    stride: PositiveInt = Field(default=128, description="tokens that neighbouring windows share")
    max_answer_length: PositiveInt = Field(default=30, description="tokens of the longest answer")
    metrics: list[str] = Field(
        default=["exact_match", "f1"], min_length=1, description="what to score; the first is the headline"
    )
    name: Literal["question-answering"] = "question-answering"

    _windows: Any = PrivateAttr(None)
    _questions: Any = PrivateAttr(None)

    @model_validator(mode="after")
    def _windows_move_on(self) -> QuestionAnswering:
        if self.stride >= self.max_length:
            raise ValueError(f"stride ({self.stride}) is what windows of max_length ({self.max_length}) share; make it smaller")
        return self

    # ---------------------------------------------------------------- the model

    def load_processor(self, path: str) -> Any:
        """The tokenizer of a checkpoint, a fast one, which knows where its tokens stand; it pads on the right."""
        tokenizer = load_fast_tokenizer(path, "where a token stands in the text")
        tokenizer.padding_side = "right"  # pads before a text would move the answers
        return tokenizer

    def _head(self, config: PreTrainedConfig, path: str) -> tuple[dict[str, Any], bool]:
        is_new = not has_head(config, "QuestionAnswering")
        return {"num_labels": 2} if is_new else {}, is_new

    def _table(self) -> Table:
        return ANSWER_METRICS

    @property
    def example_length(self) -> int:
        return self._limit(self.max_length)

    # ---------------------------------------------------------------- data

    def _used(self, rows: Dataset) -> list[str]:
        question = find_column("question_column", self.question_column, ("question",), rows.column_names, self.dataset)
        context = find_column("text_column", self.text_column, CONTEXTS, rows.column_names, self.dataset, [question])
        taken = [question, context]
        return [*taken, find_column("answers_column", self.answers_column, ANSWERS, rows.column_names, self.dataset, taken)]

    def _texts(self, rows: Dataset) -> list[str]:
        return ["question", "context"]

    def _clean(self, rows: Dataset) -> Dataset:
        """`question`, `context` and `answers`, a list of [start, text] each, without rows that lack a question or a context."""
        question, context, given = self._used(rows)
        rows = as_texts(rows.select_columns([question, context, given]), [question, context], "text_column", self.dataset)
        asked, contexts, told = rows[question][:], rows[context][:], rows[given][:]
        kept = [place for place, both in enumerate(zip(asked, contexts, strict=True)) if all(map(filled, both))]
        answers = [self._placed(place, told[place], contexts[place]) for place in kept]
        return Dataset.from_dict(
            {
                "question": [asked[place].strip() for place in kept],
                "context": [contexts[place] for place in kept],
                "starts": [[start for start, _ in some] for some in answers],
                "answers": [[text for _, text in some] for some in answers],
            }
        )

    def _placed(self, row: int, given: Any, context: str) -> list[tuple[int, str]]:
        """The answers of a row, each with the place in the context where it stands; CompressionError where one does not."""
        if isinstance(given, dict):
            texts, starts = given.get("text") or [], given.get("answer_start")
            texts = [texts] if isinstance(texts, str) else texts
            starts = [starts] if isinstance(starts, int) else starts or [None] * len(texts)
        else:
            texts, starts = ([given] if filled(given) else []) if isinstance(given, str | None) else list(given), None
        found = []
        for text, start in zip(texts, starts or [None] * len(texts), strict=True):
            if not filled(text):
                continue
            if start is None or context[start : start + len(text)] != text:
                start = context.find(text)
            if start < 0:
                raise CompressionError(
                    f"dataset {self.dataset!r}: row {row} has the answer {shown(text)}, which does not stand in its context; "
                    f"mend it, or name the right columns with answers_column and text_column."
                )
            found.append((start, text))
        return found

    def _keys(self, rows: Dataset) -> Iterable[Hashable]:
        return zip(rows["question"][:], rows["context"][:], strict=True)

    def _prepare(self, train: Dataset, held_out: Dataset, path: str) -> None:
        train = choose(train, self.max_train_samples, self.seed)
        held_out = choose(held_out, self.max_eval_samples, self.seed)
        inputs, windows = self._read_in_windows(train)
        starts, answers = train["starts"][:], train["answers"][:]
        places = [self._labelled(window, starts[window.example], answers[window.example]) for window in windows]
        self._train = Dataset.from_dict(
            {**inputs, "start_positions": [start for start, _ in places], "end_positions": [end for _, end in places]}
        )
        inputs, self._windows = self._read_in_windows(held_out)
        self._eval = Dataset.from_dict(inputs)
        self._questions = list(zip(held_out["context"][:], held_out["answers"][:], strict=True))

    def _read_in_windows(self, rows: Dataset) -> tuple[dict[str, list], list[Window]]:
        """What the model reads, a window an entry, and the windows."""
        length, wanted = self.example_length, self._wanted()
        asked = self.processor(
            rows["question"][:],
            add_special_tokens=False,
            truncation=True,
            max_length=length // 2,
            return_offsets_mapping=True,
        )  # of a question so long that no context would be left, the first half of a window
        ends = [at[-1][1] if at else 0 for at in asked["offset_mapping"]]
        questions = [text[:end] for text, end in zip(rows["question"][:], ends, strict=True)]
        room = length - max(map(len, asked["input_ids"])) - self.processor.num_special_tokens_to_add(pair=True)
        encoded = self.processor(
            questions,
            rows["context"][:],
            truncation="only_second",
            max_length=length,
            stride=max(0, min(self.stride, room - 1)),
            return_overflowing_tokens=True,
            return_offsets_mapping=True,
        )
        windows = []
        for place, example in enumerate(encoded["overflow_to_sample_mapping"]):
            parts, offsets = encoded.sequence_ids(place), encoded["offset_mapping"][place]
            windows.append(Window(example, [tuple(at) if part == 1 else None for at, part in zip(offsets, parts, strict=True)]))
        return {name: values for name, values in encoded.items() if name in wanted}, windows

    @staticmethod
    def _labelled(window: Window, starts: Sequence[int], answers: Sequence[str]) -> tuple[int, int]:
        """The first and last token of the first answer; the first token of all, where the window does not hold it whole."""
        if not answers:
            return 0, 0
        begin, end = starts[0], starts[0] + len(answers[0])
        inside = [token for token, at in enumerate(window.offsets) if at is not None and at[0] < end and at[1] > begin]
        whole = inside and window.offsets[inside[0]][0] <= begin and window.offsets[inside[-1]][1] >= end  # type: ignore[index]
        return (inside[0], inside[-1]) if whole else (0, 0)

    # ---------------------------------------------------------------- scoring

    def _said(self, output: Any) -> Tensor:
        return torch.stack([output.start_logits, output.end_logits], -1)

    def _decide(self, logits: Tensor, labels: Tensor) -> Decision:
        found = np.empty(1, dtype=object)
        found[0] = logits.float().cpu().numpy()
        return {"said": found}

    def _predict(self, model: nn.Module, data: Any) -> dict[str, np.ndarray]:
        said = super()._predict(model, data)["said"]
        can_be_silent = any(not answers for _, answers in self._questions)
        best: list[tuple[float, int, int]] = [(-np.inf, 0, 0)] * len(self._questions)
        silent = np.full(len(self._questions), np.inf)
        for window, logits in zip(self._windows, said, strict=True):
            silent[window.example] = min(silent[window.example], logits[0].sum())
            best[window.example] = max(best[window.example], _best_span(window, logits, self.max_answer_length))
        spans = [
            (0, 0) if not np.isfinite(score) or (can_be_silent and none > score) else (start, end)
            for (score, start, end), none in zip(best, silent, strict=True)
        ]
        texts = [context[start:end] for (context, _), (start, end) in zip(self._questions, spans, strict=True)]
        golds = [answers or [""] for _, answers in self._questions]
        ones = np.ones(len(texts), dtype=np.int64)
        return {
            "predictions": np.array([(start << 32) + end for start, end in spans], dtype=np.int64),
            "references": ones * 0,
            "exact": np.array([max(exactly(text, gold) for gold in some) for text, some in zip(texts, golds, strict=True)]),
            "overlap": np.array([max(overlap(text, gold) for gold in some) for text, some in zip(texts, golds, strict=True)]),
            "nll": np.zeros(len(texts)),
            "tokens": ones,
        }


def _best_span(window: Window, logits: np.ndarray, longest: int) -> tuple[float, int, int]:
    """The highest sum of logits of a start and an end (tokens, 2), in order, at most so many tokens; and where in the context
    that is. -inf where a window holds nothing of it."""
    inside = np.array([at is not None for at in window.offsets])
    starts, ends = (np.where(inside, logits[: len(inside), side], -np.inf) for side in (0, 1))
    scores = starts[:, None] + ends[None, :]
    apart = np.arange(len(inside))[None, :] - np.arange(len(inside))[:, None]
    scores[(apart < 0) | (apart >= longest)] = -np.inf
    first, last = np.unravel_index(int(np.nan_to_num(scores, nan=-np.inf).argmax()), scores.shape)
    if not np.isfinite(scores[first, last]):
        return -np.inf, 0, 0
    return float(scores[first, last]), window.offsets[first][0], window.offsets[last][1]  # type: ignore[index]
