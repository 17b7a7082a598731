"""A distillation while it runs: teachers, hooks on the student, projections, what is logged."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from hfcompress.checkpoint.errors import CompressionError
from hfcompress.distillation.batch import Lesson, Related, common, problems
from hfcompress.distillation.teacher_cache import Signals, fingerprint
from hfcompress.distillation.teachers import Teacher, find, fitting, labels_of, unwrapped
from hfcompress.distillation.terms import Layers, SoftTargets, Term
from hfcompress.distillation.trl import ASKED, as_fused, unfused
from hfcompress.layers.bitsandbytes import quiet_casts
from hfcompress.surgery.units.gates import Removable
from hfcompress.surgery.units.spans import roles
from hfcompress.surgery.units.verify import units_of


class Distilling:
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
        self._asked = {
            f"output_{term.needs}": True for term in method.summands if term.needs in ("hidden_states", "attentions")
        }
        self._projections: dict[str, nn.Linear] = {}
        self._optimizer: torch.optim.Optimizer | None = None
        self._logs: dict[str, list[Tensor]] = {}
        self._weights: list[Tensor] = []
        self._steps = self._reached = 0
        self._autocast: dict[str, Any] = {"enabled": False}
        self._relations: list[_Relations] = []
        self._signals = self._cached(task) if method.cache and self._teachers else None
        if self._signals is not None:
            self._teachers = []

    # ------------------------------------------------------------ hooks

    @contextmanager
    def hooked(self) -> Iterator[None]:
        used = [teacher.model.config._attn_implementation for teacher in self._teachers]
        for teacher in self._teachers if self._method.wants_attentions else ():
            teacher.model.set_attn_implementation("eager")
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
                self._relations = [_Relations(self._core, teacher.model, wanted) for teacher in self._teachers]
            with quiet_casts():
                yield
        finally:
            hooks.remove()
            for relations in self._relations:
                relations.remove()
            # a teacher may be the very model that results are compared with, in time too
            for teacher, implementation in zip(self._teachers, used, strict=True) if self._method.wants_attentions else ():
                teacher.model.set_attn_implementation(implementation)

    def _ask(self, student: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if not (student.training and torch.is_grad_enabled()):
            return None
        for relations in self._relations:
            relations.is_watching = True
        # As the Trainer has it, and the teacher: with a cache, transformers doesn't tell the texts of a packed row apart.
        spare = {"use_cache": False} if self._can_cache and not args else {}
        return args, unfused({**spare, **kwargs, **self._asked})

    def _notice(self, module: nn.Module, args: Any) -> None:
        kind = next(self._model.parameters()).device.type
        self._autocast = {"enabled": torch.is_autocast_enabled(kind), "dtype": torch.get_autocast_dtype(kind)}

    def _distilled(self, student: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        if student.training and torch.is_grad_enabled():
            inputs = _by_name(student, args, kwargs)
            found, weights = problems(self._core, inputs, output)
            device, recorded = found[0].logits.device, None
            if self._signals is not None:
                recorded = self._signals.of(self._core, inputs, found[0])
            with torch.autocast(device.type, **self._autocast):
                answers = [teacher(self._shown(inputs), device, **self._asked) for teacher in self._teachers]
            lesson = Lesson(
                inputs=inputs,
                student=output,
                teachers=answers,
                problems=found,
                weights=weights,
                temperature=self._method.temperature,
                is_encoder_decoder=self._core.config.is_encoder_decoder,
                project=self._project,
                recorded=recorded,
                relations=[relations.seen() for relations in self._relations],
            )
            output.loss = self._loss(lesson, inputs.get("num_items_in_batch"))
            if ASKED in inputs:
                as_fused(output, found[0], output.loss * weights.sum().clamp_min(1))
        return output

    def _shown(self, inputs: dict[str, Any]) -> dict[str, Any]:
        ours = {"return_dict", ASKED}
        return {name: value for name, value in inputs.items() if not name.startswith("output_") and name not in ours}

    def _loss(self, lesson: Lesson, total: Any) -> Tensor:
        """The weighted terms, divided by the labels of the whole accumulated batch where the Trainer counted them: it does not
        divide by the accumulation steps then. Without that count it does, and the batch's own is the right divisor."""
        mine = lesson.weights.sum().clamp_min(1)
        values = {term.key: lesson.mean(term.parts(lesson)) for term in self._method.summands}
        for key, value in values.items():
            self._logs.setdefault(f"distill/{key}", []).append(value.detach())
        self._weights.append(mine)
        loss = torch.stack([term.weight * values[term.key] for term in self._method.summands]).sum()
        # a whole accumulated batch without a label has a total of 0
        loss = loss / (mine if total is None else torch.as_tensor(total, device=mine.device).clamp_min(1))
        if (auxiliary := self._balance(lesson.student)) is not None:
            loss = loss + auxiliary * (1 if total is None else mine / total)
        self._steps += 1
        if loss.requires_grad:
            loss.register_hook(self._reach)
        return loss

    def _balance(self, output: Any) -> Tensor | None:
        """What keeps the experts of a mixture in use: its model adds it to the loss that is replaced here."""
        weight, found = getattr(self._core.config, "router_aux_loss_coef", None), getattr(output, "aux_loss", None)
        return weight * found if weight and isinstance(found, Tensor) else None

    def _reach(self, gradient: Tensor) -> None:
        self._reached += 1

    # ------------------------------------------------------------ between steps

    def tick(self, progress: float) -> dict[str, Tensor] | None:
        """After an optimizer step: projections learn, and what the terms were is told."""
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
        told = {name: torch.stack(values).sum() / torch.stack(self._weights).sum() for name, values in self._logs.items()}
        self._logs, self._weights = {}, []
        return told or None

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

    def _cached(self, task: Any) -> Signals:
        method, soft = self._method, [term for term in self._method.summands if term.needs == "logits"]
        temperatures = {(term.temperature or method.temperature) for term in soft if isinstance(term, SoftTargets)}
        plan = {
            "teachers": [fingerprint(teacher.model) for teacher in self._teachers],
            "labels": labels_of(self._core),
            "positions": "all" if any(getattr(term, "positions", "labels") == "all" for term in soft) else "labels",
            "top_k": method.top_k if all(isinstance(term, SoftTargets) for term in soft) else 10**9,
            "temperatures": sorted(temperatures),
        }
        signals = Signals(method.cache or "", plan)
        if not signals.is_complete:
            signals.record(task.batches(self._model, None), self._answer, self._core)
        signals.open().check(task.batches(self._model, 256), self._core)
        return signals

    def _answer(self, batch: dict[str, Tensor]) -> tuple[Any, list[Tensor]]:
        device = next(self._model.parameters()).device
        answers = [teacher(batch, device) for teacher in self._teachers]
        found, _ = problems(self._core, batch, answers[0])
        if len(found) > 1:
            raise CompressionError(
                f"distill: cache stores classes, and {type(self._core).__name__} answers with positions; leave cache out."
            )
        return found[0], common([answer.logits for answer in answers])


class _Relations:
    """Watches queries, keys and values of the layers that terms ask for, in a student and a teacher."""

    def __init__(self, student: nn.Module, teacher: nn.Module, terms: list[Any]) -> None:
        mine, theirs = units_of(student, "heads"), units_of(teacher, "heads")
        self._layers = (len(mine), len(theirs))
        self._heads = theirs[0].count
        pairs = [pair for term in terms for pair in term.pairs(*self._layers)]
        self._expected = {pair[0] for pair in pairs}
        self._seen: tuple[dict[int, dict[str, Tensor]], dict[int, dict[str, Tensor]]] = ({}, {})
        self._handles: list[Any] = []
        self.is_watching = False
        for side, (model, where) in enumerate(((student, mine), (teacher, theirs))):
            if not all(map(roles, where)):
                raise CompressionError(
                    f"distill: relations: which projections of {type(model).__name__} make queries, keys and values is not "
                    f"known; take another term, such as hidden_mse or attention_mse."
                )
            for layer in {pair[side] for pair in pairs}:
                for name, kinds in roles(where[layer]):
                    self._handles.append(model.get_submodule(name).register_forward_hook(self._watch(side, layer, kinds)))

    def _watch(self, side: int, layer: int, kinds: tuple[str, ...]) -> Any:
        def watch(module: nn.Module, args: Any, output: Tensor) -> None:
            if side or (self.is_watching and torch.is_grad_enabled()):  # backward runs checkpointed layers once more
                self._seen[side].setdefault(layer, {}).update(zip(kinds, output.chunk(len(kinds), dim=-1), strict=True))

        return watch

    def seen(self) -> Related:
        self.is_watching = False
        if self._expected - set(self._seen[0]):
            raise CompressionError(
                "distill: relations: gradient checkpointing with use_reentrant hides the layers; set "
                "gradient_checkpointing_kwargs={'use_reentrant': False}."
            )
        related = Related(dict(self._seen[0]), dict(self._seen[1]), self._layers, self._heads)
        for side in self._seen:
            side.clear()
        return related

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()


def _check_kind(model: Any, terms: tuple[Term, ...]) -> None:
    """Refuse before training what `problems` would find out in it."""
    if not getattr(model.config, "return_dict", True):
        raise CompressionError(
            f"distill: {type(model).__name__} returns tuples, and the loss is found by its name; set config.return_dict = True."
        )
    config, soft = model.config, next((term for term in terms if isinstance(term, SoftTargets)), None)
    is_number = getattr(config, "num_labels", 2) == 1 or getattr(config, "problem_type", None) == "regression"
    if soft is not None and type(model).__name__.endswith("SequenceClassification") and is_number:
        raise CompressionError(
            f"distill: {soft.key} compares classes, and this {type(model).__name__} foretells a number; "
            f"use terms: [logits_mse, task], or train without distill."
        )


def _by_name(student: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """What the student was called with, positional arguments by their names."""
    if not args:
        return kwargs
    names = [name for name in inspect.signature(student.forward).parameters if name != "self"]
    return dict(zip(names, args, strict=False)) | kwargs
