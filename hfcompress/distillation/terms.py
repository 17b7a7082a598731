"""The one table of loss terms. Adding one: its class, its line here, its row in the tests of laws."""

from __future__ import annotations

from hfcompress.distillation.answer_terms import (
    KL,
    Embedding,
    JensenShannon,
    LogitsMSE,
    ReverseKL,
    SkewedKL,
    SoftCrossEntropy,
    Task,
)
from hfcompress.distillation.base import Term
from hfcompress.distillation.layer_terms import AttentionKL, AttentionMSE, HiddenCosine, HiddenMSE, Relations

TERMS: dict[str, type[Term]] = {
    term.key: term
    for term in (
        Task,
        KL,
        SoftCrossEntropy,
        ReverseKL,
        JensenShannon,
        SkewedKL,
        LogitsMSE,
        Embedding,
        HiddenMSE,
        HiddenCosine,
        AttentionMSE,
        AttentionKL,
        Relations,
    )
}
"""A term's name in a recipe, and its class."""
