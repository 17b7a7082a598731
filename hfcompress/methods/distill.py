"""Knowledge distillation as a method: its card, its fields, and the teachers and terms they ask for."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar, Literal

from pydantic import Field, SerializeAsAny, ValidationError, field_serializer, field_validator, model_validator
from torch import nn

from hfcompress.checkpoint.errors import CompressionError, did_you_mean
from hfcompress.distillation.base import Term
from hfcompress.distillation.hooks import Distillation
from hfcompress.distillation.teachers import ORIGINAL
from hfcompress.distillation.terms import TERMS
from hfcompress.methods.base import Method, Tick


class Distill(Method):
    """Learn from a teacher: alpha * T^2 KL + (1 - alpha) * task loss, or any list of terms with weights.

    Needs: training around it, and a teacher with the same labels or vocabulary.
    Buys: what pruning, factoring or fewer layers cost, in part or whole (docs/quickstart.md has it measured).
    Costs: the teacher's forward pass at every step, or once over the training set with a cache.
    Paper: Hinton et al. 2015 (arXiv 1503.02531); Sanh et al. 2019, DistilBERT (arXiv 1910.01108)
    """

    edits: ClassVar[frozenset[str]] = frozenset({"loss"})
    needs_training: ClassVar[bool] = True
    writes: ClassVar[frozenset[str]] = frozenset({"cache"})
    tag: ClassVar[str] = "distillation"

    teacher: Any = Field(
        default=ORIGINAL,
        description="original: the model before its first compressing step; current: as it stands now; a path or Hub id; "
        "or, in Python, a model. A list of these is an ensemble, averaged.",
    )
    temperature: float = Field(default=2.0, gt=0, allow_inf_nan=False, description="Softens both distributions.")
    alpha: float = Field(default=0.7, ge=0, le=1, description="Weight of the soft targets; the task loss gets the rest.")
    terms: tuple[SerializeAsAny[Term], ...] | None = Field(
        default=None,
        min_length=1,
        description=f"Instead of alpha: {', '.join(TERMS)}, each a name, name: weight or name: {{fields}}.",
    )
    teacher_bits: Literal[8, 4] | None = Field(default=None, description="Hold the teacher's linear layers in so many bits.")
    cache: str | None = Field(
        default=None, min_length=1, description="A folder: the teacher's answers are recorded there once, and read from there."
    )
    top_k: int = Field(
        default=64, ge=1, description="In the cache, of each token: the likeliest classes, and the mass of the rest."
    )
    projection_lr: float = Field(
        default=1e-3, gt=0, description="Adam's step for projections, which terms on hidden states may need."
    )

    @field_validator("teacher")
    @classmethod
    def _is_teacher(cls, given: Any) -> Any:
        several = list(given) if isinstance(given, list | tuple) else [given]
        if not several or not all(isinstance(one, nn.Module) or (isinstance(one, str) and one) for one in several):
            raise ValueError("a teacher is original, current, a path, a Hub id or (in Python) a model, or a list of these")
        return given

    @field_validator("terms", mode="before")
    @classmethod
    def _read_terms(cls, given: Any) -> Any:
        if given is None:
            return None
        if not isinstance(given, list | tuple):
            raise ValueError("terms is a list, as in [kl: 0.7, task: 0.3]")
        return tuple(one if isinstance(one, Term) else _term(one) for one in given)

    @model_validator(mode="after")
    def _fields_fit(self) -> Distill:
        if self.terms is None:
            return self
        if "alpha" in self.model_fields_set:
            raise ValueError("alpha weighs kl and task, and terms have weights of their own; remove one of the two")
        names = [term.key for term in self.terms]
        if twice := next((name for name in names if names.count(name) > 1), None):
            raise ValueError(f"{twice} is listed twice; add up the weights")
        if not self.summands:
            raise ValueError("every term has weight 0, and there is nothing to learn; give one a weight")
        self._check_cache()
        return self

    def _check_cache(self) -> None:
        for term in self.terms or () if self.cache else ():
            if term.needs not in ("labels", "logits"):
                raise ValueError(
                    f"cache stores the teacher's answers, and {term.key} needs its {term.needs}; leave out one of the two"
                )
            if term.key == "logits_mse" and "top_k" in self.model_fields_set:
                raise ValueError("top_k does not store whole logits, which logits_mse needs; leave out one of the two")

    @field_serializer("teacher")
    def _name_of_teacher(self, teacher: Any) -> Any:
        if isinstance(teacher, list | tuple):
            return [self._name_of_teacher(one) for one in teacher]
        return teacher if isinstance(teacher, str) else type(teacher).__name__

    @property
    def summands(self) -> tuple[Term, ...]:
        """The terms, whichever way they were given; those of weight 0 left out."""
        given = self.terms or (TERMS["kl"](weight=self.alpha), TERMS["task"](weight=1 - self.alpha))
        return tuple(term for term in given if term.weight)

    @property
    def teachers(self) -> list[Any]:
        """As asked for; none if all the terms do without."""
        if all(term.needs == "labels" for term in self.summands):
            return []
        return list(self.teacher) if isinstance(self.teacher, list | tuple) else [self.teacher]

    @property
    def has_teacher(self) -> bool:
        return bool(self.teachers)

    @property
    def learns_labels(self) -> bool:
        return any(term.needs == "labels" for term in self.summands)

    @property
    def wants_original(self) -> bool:
        return any(isinstance(one, str) and one == ORIGINAL for one in self.teachers)

    @property
    def wants_attentions(self) -> bool:
        return any(term.needs == "attentions" for term in self.summands)

    @contextmanager
    def applied(self, model: nn.Module, task: Any) -> Iterator[Tick | None]:
        if self.wants_attentions:
            _check_attentions(model, self.summands)
        # Teachers live in this frame, not in the model: no checkpoint, optimizer or train() can reach them.
        distillation = Distillation(self, model, task)
        with distillation.hooked():
            yield distillation.tick


def _term(given: Any) -> Term:
    """`kl`, `{kl: 0.7}` or `{kl: {weight: 0.7, temperature: 4}}`; a ValueError with a sentence for anything else."""
    if isinstance(given, str):
        given = {given: {}}
    if not isinstance(given, dict) or len(given) != 1:
        raise ValueError(f"a term is a name, name: weight or name: {{fields}}, not {given!r}")
    ((name, fields),) = given.items()
    if name not in TERMS:
        raise ValueError(f"there is no term {name!r}.{did_you_mean(str(name), TERMS)}")
    fields = {"weight": fields} if isinstance(fields, int | float) and not isinstance(fields, bool) else fields
    if not isinstance(fields, dict):
        raise ValueError(f"{name}: give its weight or a mapping of fields, not {fields!r}")
    try:
        return TERMS[name](**{str(key): value for key, value in fields.items()})
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"]))
        if first["type"] == "extra_forbidden":
            raise ValueError(f"{name}: unknown key {key!r}.{did_you_mean(key, TERMS[name].model_fields)}") from error
        raise ValueError(f"{name}.{key} = {first['input']!r}: {first['msg'][0].lower()}{first['msg'][1:]}") from error


def _check_attentions(model: Any, terms: tuple[Term, ...]) -> None:
    used = getattr(getattr(model, "config", None), "_attn_implementation", "eager")
    if used != "eager":
        key = next(term.key for term in terms if term.needs == "attentions")
        raise CompressionError(
            f"distill: {key} needs attention maps, and attn_implementation {used!r} returns none; load the model with "
            f"attn_implementation='eager' or call model.set_attn_implementation('eager'), or take relations instead."
        )
