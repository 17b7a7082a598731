"""The one table of tasks: a line a task. Nothing else knows datasets."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hfcompress.checkpoint.errors import CompressionError, did_you_mean
from hfcompress.tasks.base import Task
from hfcompress.tasks.causal_lm import CausalLM
from hfcompress.tasks.image_classification import ImageClassification
from hfcompress.tasks.masked_lm import MaskedLM
from hfcompress.tasks.question_answering import QuestionAnswering
from hfcompress.tasks.sentence_embeddings import SentenceEmbeddings
from hfcompress.tasks.seq2seq_lm import Seq2SeqLM
from hfcompress.tasks.text_classification import TextClassification
from hfcompress.tasks.token_classification import TokenClassification

TASKS: dict[str, type[Task]] = {
    task.model_fields["name"].default: task
    for task in (
        TextClassification,
        TokenClassification,
        CausalLM,
        MaskedLM,
        Seq2SeqLM,
        ImageClassification,
        QuestionAnswering,
        SentenceEmbeddings,
    )
}

__all__ = ["TASKS", "Task", "read_task", *(task.__name__ for task in TASKS.values())]


def read_task(mapping: Mapping[str, Any]) -> Task:
    """`{name: text-classification, dataset: ...}` -> the task. An unknown name is a `CompressionError`, a wrong field
    pydantic's ValidationError."""
    name = mapping.get("name")
    if name not in TASKS:
        said = "there is no name" if name is None else f"there is no task {name!r}"
        raise CompressionError(f"task: {said}; name one.{did_you_mean(str(name or ''), TASKS)}")
    return TASKS[name](**mapping)
