"""Knowledge distillation by forward hooks: teachers beside the student, its loss replaced, projections, what is logged."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sized
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from hfcompress.checkpoint.errors import CompressionError
from hfcompress.checkpoint.sentence_head import sentence_head_of
from hfcompress.distillation.answer_terms import Embedding, SoftTargets, Task
from hfcompress.distillation.base import Term
from hfcompress.distillation.batch import Batch, common
from hfcompress.distillation.layer_terms import Layers
from hfcompress.distillation.own_loss import balance
from hfcompress.distillation.predictions import by_name, check_output, config_of, predictions, put_loss
from hfcompress.distillation.relations import RelationHooks
from hfcompress.distillation.teacher_cache import TeacherCache, fingerprint
from hfcompress.distillation.teachers import Teacher, find, fitting, labels_of, unwrapped
from hfcompress.distillation.trl import ASKED, as_fused, unfused
from hfcompress.layers.bnb_library import quiet_casts
from hfcompress.surgery.units.gates import Removable


class Distillation:
    """One run of distillation: the teachers, the projections, the hooks on the student."""

    def __init__(self, method: Any, model: Any, task: Any) -> None:
        self._method, self._model, self._core = method, model, unwrapped(model)
        self._is_resumed = getattr(task, "is_resumed", False)
        self._can_cache = "use_cache" in inspect.signature(self._core.forward).parameters
        _check_kind(self._core, method.summands)
        self._teachers: list[Teacher] = []
        processor = getattr(task, "processor", None) if method.teachers else None
        for asked in method.teachers:
            found = find(asked, model, task, method.teacher_bits)
            self._teachers.append(Teacher(found, fitting(model, found, asked, processor)))
        self._asked: dict[str, bool] = {}
        for term in method.summands:
            if term.needs in ("hidden_states", "attentions"):
                self._asked[f"output_{term.needs}"] = True
                for one in (self._core, *(teacher.model for teacher in self._teachers)):
                    _check_asked(one, term)
        self._projections: dict[str, nn.Linear] = {}
        self._optimizer: torch.optim.Optimizer | None = None
        self._logs: dict[str, list[Tensor]] = {}
        self._weights: list[Tensor] = []
        self._steps = self._reached = 0
        self._autocast: dict[str, Any] = {"enabled": False}
        self._total: Any = None
        self._relations: list[RelationHooks] = []
        self._cache = self._cached(task) if method.cache and self._teachers else None
        if self._cache is not None:
            self._teachers = []

    # ------------------------------------------------------------ hooks

    @contextmanager
    def hooked(self) -> Iterator[None]:
        mapped = [teacher.model for teacher in self._teachers if hasattr(teacher.model, "set_attn_implementation")]
        mapped = mapped if self._method.wants_attentions else []
        used = [teacher.config._attn_implementation for teacher in mapped]
        for teacher in mapped:
            teacher.set_attn_implementation("eager")
        handles = [
            self._model.register_forward_pre_hook(self._ask, with_kwargs=True),
            self._model.register_forward_hook(self._distilled, with_kwargs=True),
        ]
        # accelerate's autocast is around forward, not around hooks: what it is can be seen from inside only.
        handles += [child.register_forward_pre_hook(self._notice) for child in self._core.children()]
        hooks = Removable(handles)
        try:
            if any(term.needs == "relations" for term in self._method.summands):
                wanted = [term for term in self._method.summands if isinstance(term, Layers) and term.needs == "relations"]
                self._relations = [RelationHooks(self._core, teacher.model, wanted) for teacher in self._teachers]
            with quiet_casts():
                yield
        finally:
            hooks.remove()
            for relations in self._relations:
                relations.remove()
            # a teacher may be the very model that results are compared with, in time too
            for teacher, implementation in zip(mapped, used, strict=True):
                teacher.set_attn_implementation(implementation)

    def _ask(self, student: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if not (student.training and torch.is_grad_enabled()):
            return None
        if getattr(student, "_is_replica", False):
            raise CompressionError(
                "distill: torch's DataParallel runs copies of the student in threads, and has one teacher for all; start "
                "a process a GPU with `accelerate launch` or `torchrun`, or set CUDA_VISIBLE_DEVICES to one."
            )
        for relations in self._relations:
            relations.is_watching = True
        # As the Trainer has it, and the teacher: with a cache, transformers doesn't tell the texts of a packed row apart.
        spare = {"use_cache": False} if self._can_cache and not args else {}
        given = unfused({**spare, **kwargs, **self._asked})
        # A head that heeds the count gives a part of a mean, one that does not a mean: without it all give the mean.
        self._total = given.pop("num_items_in_batch", None)
        return args, given

    def _notice(self, module: nn.Module, args: Any) -> None:
        kind = next(self._model.parameters()).device.type
        self._autocast = {"enabled": torch.is_autocast_enabled(kind), "dtype": torch.get_autocast_dtype(kind)}

    def _distilled(self, student: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        if student.training and torch.is_grad_enabled():
            check_output(self._core, output)
            inputs, answer = _by_name(student, args, kwargs), by_name(output)
            found, weights = predictions(self._core, inputs, answer)
            device, recorded = found[0].logits.device, None
            if self._cache is not None:
                recorded = self._cache.of(self._core, inputs, found[0])
            with torch.autocast(device.type, **self._autocast):
                answers = [teacher(self._shown(inputs), device, **self._asked) for teacher in self._teachers]
            batch = Batch(
                model=self._core,
                inputs=inputs,
                output=answer,
                teachers=answers,
                predictions=found,
                weights=weights,
                temperature=self._method.temperature,
                project=self._project,
                total=self._total,
                recorded=recorded,
                relations=[relations.seen() for relations in self._relations],
            )
            loss = self._loss(batch)
            put_loss(output, loss)
            if ASKED in inputs:
                as_fused(output, found[0], loss * weights.sum().clamp_min(1))
        return output

    def _shown(self, inputs: dict[str, Any]) -> dict[str, Any]:
        ours = {"return_dict", ASKED}
        return {name: value for name, value in inputs.items() if not name.startswith("output_") and name not in ours}

    def _loss(self, batch: Batch) -> Tensor:
        """The weighted terms, divided by the labels of the whole accumulated batch where the Trainer counted them: it does not
        divide by the accumulation steps then. Without that count it does, and the batch's own is the right divisor."""
        mine, total = batch.weights.sum(), batch.total
        values = {term.key: term.total(batch) for term in self._method.summands}
        for key, value in values.items():
            self._logs.setdefault(f"distill/{key}", []).append(value.detach())
        self._weights.append(mine.clamp_min(1))
        loss = torch.stack([term.weight * values[term.key] for term in self._method.summands]).sum()
        # a whole accumulated batch without a label has a total of 0
        divisor = (mine if total is None else torch.as_tensor(total, device=mine.device)).clamp_min(1)
        loss = loss / divisor
        if (auxiliary := balance(self._core, batch.output)) is not None:
            loss = loss + auxiliary * (1 if total is None else mine / divisor)
        self._steps += 1
        if loss.requires_grad:
            loss.register_hook(self._reach)
        return loss

    def _reach(self, gradient: Tensor) -> None:
        self._reached += 1

    # ------------------------------------------------------------ between steps

    def tick(self, progress: float) -> dict[str, Tensor] | None:
        """After an optimizer step: projections learn. The mean of each term since the last one, for the log."""
        if self._steps and not self._reached:
            raise CompressionError(
                "distill: the loss it put into the model's output was not the one that was trained on; a compute_loss of your "
                "own must return outputs.loss, and compute_loss_func must not be set."
            )
        self._steps = self._reached = 0
        if self._optimizer is not None:
            self._share_gradients()
            if self._is_finite():
                self._optimizer.step()
            self._optimizer.zero_grad(set_to_none=True)
        means = {name: torch.stack(values).sum() / torch.stack(self._weights).sum() for name, values in self._logs.items()}
        self._logs, self._weights = {}, []
        return means or None

    def _project(self, name: str, hidden: Tensor, width: int) -> Tensor:
        """Projections are no part of the student: a checkpoint holds its keys only, and they are left behind after training."""
        if hidden.shape[-1] == width:
            return hidden
        if name not in self._projections:
            if self._is_resumed:
                raise CompressionError(
                    f"resume_from_checkpoint: {name.partition('.')[0]} learns a projection from width {hidden.shape[-1]} to "
                    f"{width}, which no checkpoint holds; train from the start, or take terms without one (relations)."
                )
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(len(self._projections))  # the same on every process
                made = nn.Linear(hidden.shape[-1], width, bias=False).to(hidden.device)
            self._projections[name] = made
            if self._optimizer is None:
                self._optimizer = torch.optim.Adam(made.parameters(), lr=self._method.projection_lr)
            else:
                self._optimizer.add_param_group({"params": list(made.parameters())})
        return self._projections[name](hidden.float())

    def _is_finite(self) -> bool:
        """float16's scaled loss overflows now and then; the Trainer's own optimizer leaves such a step out too."""
        grads = [one.weight.grad for one in self._projections.values() if one.weight.grad is not None]
        return not grads or bool(torch.stack([grad.isfinite().all() for grad in grads]).all())

    def _share_gradients(self) -> None:
        """What DistributedDataParallel does for the student's own weights."""
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            for projection in self._projections.values():
                if projection.weight.grad is not None:
                    torch.distributed.all_reduce(projection.weight.grad)
                    projection.weight.grad /= torch.distributed.get_world_size()

    # ------------------------------------------------------------ the cache

    def _cached(self, task: Any) -> TeacherCache:
        method, soft = self._method, [term for term in self._method.summands if term.needs == "logits"]
        temperatures = {(term.temperature or method.temperature) for term in soft if isinstance(term, SoftTargets)}
        plan = {
            "teachers": [fingerprint(teacher.model) for teacher in self._teachers],
            "labels": labels_of(self._core),
            "positions": "all" if any(getattr(term, "positions", "labels") == "all" for term in soft) else "labels",
            "top_k": method.top_k if all(isinstance(term, SoftTargets) for term in soft) else 10**9,
            "temperatures": sorted(temperatures),
        }
        cache = TeacherCache(method.cache or "", plan)
        if not cache.is_complete:
            data = getattr(task, "train_dataset", None)
            total = len(data) if isinstance(data, Sized) else None
            cache.record(task.batches(self._model, None), self._answer, self._core, total)
        cache.open().check(task.batches(self._model, 256), self._core)
        return cache

    def _answer(self, batch: dict[str, Tensor]) -> tuple[Any, list[Tensor]]:
        device = next(self._model.parameters()).device
        answers = [teacher(batch, device) for teacher in self._teachers]
        found, _ = predictions(self._core, batch, answers[0])
        if len(found) > 1:
            raise CompressionError(
                f"distill: cache stores classes, and {type(self._core).__name__} answers with positions; leave cache out."
            )
        return found[0], common([answer.logits for answer in answers])


def _check_kind(model: Any, terms: tuple[Term, ...]) -> None:
    """Refuse before training what would come out in it."""
    config, soft = config_of(model), next((term for term in terms if isinstance(term, SoftTargets)), None)
    if not getattr(config, "return_dict", True):
        raise CompressionError(
            f"distill: {type(model).__name__} returns tuples, and the loss is found by its name; set config.return_dict = True."
        )
    embeds = sentence_head_of(model) is not None
    for term in terms:
        if embeds and isinstance(term, SoftTargets | Task):
            raise CompressionError(
                f"distill: {term.key} is of classes or labels, and this {type(model).__name__} tells embeddings; use "
                f"terms: [embedding]."
            )
        if isinstance(term, Embedding) and not embeds:
            raise CompressionError(
                f"distill: embedding compares embeddings of texts, and this {type(model).__name__} tells none; take the task "
                f"sentence-embeddings, or another term, such as kl."
            )
    is_number = getattr(config, "num_labels", 2) == 1 or getattr(config, "problem_type", None) == "regression"
    if soft is not None and type(model).__name__.endswith("SequenceClassification") and is_number:
        raise CompressionError(
            f"distill: {soft.key} compares classes, and this {type(model).__name__} foretells a number; "
            f"use terms: [logits_mse, task], or train without distill."
        )


def _check_asked(model: Any, term: Term) -> None:
    accepted = inspect.signature(model.forward).parameters
    if f"output_{term.needs}" not in accepted and all(one.kind != one.VAR_KEYWORD for one in accepted.values()):
        raise CompressionError(
            f"distill: {term.key} needs {term.needs}, and {type(model).__name__}.forward takes no output_{term.needs}; take a "
            f"term on answers, such as kl."
        )


def _by_name(student: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """What the student was called with, positional arguments by their names."""
    if not args:
        return kwargs
    names = [name for name in inspect.signature(student.forward).parameters if name != "self"]
    return dict(zip(names, args, strict=False)) | kwargs
