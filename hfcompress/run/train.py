"""The recipe's `train` step: the Hugging Face Trainer, with methods riding along."""

from __future__ import annotations

import logging
import math
import tempfile
import typing
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from pydantic import ConfigDict, Field, InstanceOf, PrivateAttr, SerializeAsAny, TypeAdapter, ValidationError, model_validator
from torch import nn
from transformers import PrinterCallback, ProgressCallback, Trainer, TrainerCallback, TrainingArguments, get_scheduler
from transformers.integrations import get_reporting_integration_callbacks

from hfcompress.calibration.batches import foretells_next
from hfcompress.calibration.progress import progress
from hfcompress.checkpoint.errors import CompressionError, did_you_mean, shown
from hfcompress.methods import Distill
from hfcompress.methods.base import Method, Step
from hfcompress.methods.riding import riding
from hfcompress.results.measure import CURVE, Curve
from hfcompress.run.callback import Ticking, check_riders, shards
from hfcompress.run.training_values import value_mistake
from hfcompress.surgery.modules import in_float32

log = logging.getLogger("hfcompress")

# What the recipe decides itself: where things lie, and which process does what.
_OURS = frozenset({"output_dir", "push_to_hub", "hub_model_id", "hub_token", "resume_from_checkpoint", "local_rank"})


def training_fields() -> dict[str, Any]:
    """Every TrainingArguments field that a recipe may set, and its type."""
    hints = typing.get_type_hints(TrainingArguments)
    return {name: hints[name] for name in TrainingArguments.__dataclass_fields__ if name not in _OURS}


class Train(Step):
    """Train with the Hugging Face Trainer; every TrainingArguments field is allowed under its own name.

    bf16 is on by default where the processor has it; nothing is reported to trackers unless `report_to` asks for it. A model
    stored in half precision is trained in float32, which takes memory, and has its dtype back afterwards.
    """

    model_config = ConfigDict(extra="allow")

    epochs: float = Field(default=3.0, gt=0, description="num_train_epochs.")
    riders: tuple[SerializeAsAny[InstanceOf[Method]], ...] = Field(
        default=(), alias="with", description="Methods applied around this training, in this order."
    )

    _curve: Curve = PrivateAttr(default_factory=list)

    if TYPE_CHECKING:  # or a type checker would allow the two fields alone

        def __init__(self, /, *positional: Any, **fields: Any) -> None: ...

    @model_validator(mode="before")
    @classmethod
    def _typed(cls, given: Any) -> Any:
        if not isinstance(given, dict):
            return given
        given, known = dict(given), training_fields()
        if "num_train_epochs" in given:
            raise ValueError("num_train_epochs is called epochs here; write epochs")
        for name in set(given) - {"epochs", "with", "riders"}:
            if name not in known:
                raise ValueError(f"unknown key {shown(name)}.{did_you_mean(name, ['epochs', 'with', *known])}")
            try:
                given[name] = TypeAdapter(known[name]).validate_python(given[name])
            except ValidationError as error:
                raise ValueError(f"{name} = {shown(given[name])}: {error.errors()[0]['msg']}") from error
            if mistake := value_mistake(name, given[name]):
                raise ValueError(mistake)
        return given

    def __str__(self) -> str:
        fields = self.model_dump(mode="json", exclude={"riders"}, exclude_defaults=True)
        told = ", ".join(f"{name}: {value}" for name, value in {"epochs": self.epochs, **fields}.items())
        return f"train ({told})" + "".join(f", with {rider}" for rider in self.riders)

    @property
    def label(self) -> str:
        return " + ".join([self.key(), *(rider.key() for rider in self.riders)])

    @property
    def without_teacher(self) -> Train | None:
        """The same training without distillation, to compare with; None if there is no teacher in it."""
        rest = tuple(rider for rider in self.riders if not rider.has_teacher)
        return None if len(rest) == len(self.riders) else self.model_copy(update={"riders": rest})

    def seeded(self, seed: int) -> Train:
        """A copy with this seed, unless it has one of its own."""
        return self.model_copy(update={} if "seed" in (self.model_extra or {}) else {"seed": seed})

    @property
    def curve(self) -> Curve:
        """The losses of its last run, see `Row`."""
        return self._curve

    def check_here(self) -> None:
        """Build what training builds without a model, so that what this machine can't do is found before anything runs.

        CompressionError: an optimizer, schedule, tracker or precision that needs what is not here; arguments that don't fit.
        """
        if (self.model_extra or {}).get("use_cpu") is False and not torch.accelerator.is_available():
            raise CompressionError(
                "train: use_cpu: false asks for an accelerator, and none is visible here; leave use_cpu out."
            )
        try:
            arguments = self.arguments("unused")
            Trainer.get_optimizer_cls_and_kwargs(arguments)
            plain = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=arguments.learning_rate)
            more: Any = arguments.lr_scheduler_kwargs or {}
            get_scheduler(arguments.lr_scheduler_type, plain, 1, 10, scheduler_specific_kwargs=more)
            for tracker in get_reporting_integration_callbacks(arguments.report_to):
                tracker()
        except CompressionError:
            raise
        except Exception as error:  # transformers, torch and the trackers all have errors of their own here
            said = " ".join((str(error).strip() or type(error).__name__).split())
            raise CompressionError(
                f"train: {said[:400].rstrip('.')}; change that argument, or mend it on this machine."
            ) from error
        _check_whole(arguments)

    def run(self, model: nn.Module, task: Any) -> None:
        with tempfile.TemporaryDirectory(prefix="hfcompress-train-") as folder:
            arguments = self.arguments(folder)
            transformers_set_seed(arguments.seed)
            _check_whole(arguments)
            if getattr(model, "peft_config", None):
                raise CompressionError(
                    "train: the model carries an adapter, and its own weights are frozen; merge the adapter first "
                    "(PeftModel.merge_and_unload)."
                )
            trained = any(parameter.requires_grad for parameter in model.parameters())
            if not trained and not any(rider.adds_parameters for rider in self.riders):
                raise CompressionError("train: no weight of the model can be trained; add adapters or heal under with.")
            riders = (*self.riders, *_own_loss(model, self.riders, arguments))
            check_riders(riders, arguments)
            with _trainable(model, riders), _returning_attentions(model, riders), riding(model, riders, task) as tick:
                with _codes_admitted(model, riders):
                    trainer = _trainer(model, arguments, task, tick)
                trainer.train()
                self._curve = thinned(trainer.state.log_history)
                # accelerate wrapped forward in autocast and would leave it there: later steps would measure another model.
                trainer.accelerator.unwrap_model(model, keep_fp32_wrapper=False)
                # Nor would it put autocast there again in a later step, for a model that it takes for prepared.
                vars(model).pop("_is_accelerate_prepared", None)
            model.zero_grad(set_to_none=True)

    def arguments(self, output_dir: str) -> TrainingArguments:
        defaults = {
            "report_to": "none",
            "save_strategy": "no",
            "logging_steps": 10,
            "bf16": has_bf16(),
            "use_cpu": not torch.accelerator.is_available(),
        }
        if self.model_extra and self.model_extra.get("fp16"):
            defaults["bf16"] = False
        arguments = TrainingArguments(
            output_dir=output_dir,
            **{**defaults, **(self.model_extra or {}), "num_train_epochs": self.epochs, "disable_tqdm": True},
        )
        if arguments.n_gpu > 1:  # DataParallel copies the model at every step, and what rides along with it dies
            log.warning(
                "train: one of %d GPUs is used; start a process a GPU with torchrun or accelerate launch to use all.",
                arguments.n_gpu,
            )
            arguments._n_gpu = 1
        return arguments


@contextmanager
def _trainable(model: nn.Module, riders: Iterable[Method]) -> Iterator[None]:
    """Weights of half precision in float32 while they are trained, and afterwards in the dtype they had, unless a rider casts
    them. Adapters see to their own, and leave what they freeze as it is."""
    riders = tuple(riders)
    if any("adapter" in rider.edits for rider in riders):
        yield
        return
    casts = any("dtype" in rider.edits for rider in riders)
    with in_float32(model, gives_back=not casts):
        yield


@contextmanager
def _codes_admitted(model: Any, riders: Iterable[Method]) -> Iterator[None]:
    """transformers' Trainer refuses a model that was loaded with low-bit layers, but for PEFT's adapters on it: it can't know
    that what is trained stands beside the codes."""
    was = getattr(model, "is_quantized", False)
    if not was or not any(rider.chooses_trained for rider in riders):
        yield
        return
    model.is_quantized = False
    try:
        yield
    finally:
        model.is_quantized = was


def _check_whole(arguments: TrainingArguments) -> None:
    if shards(arguments):
        raise CompressionError(
            "train: FSDP would leave the model in pieces, and the steps of a recipe need it whole; "
            "use DistributedDataParallel, or distil under FSDP in a script of your own."
        )


def _own_loss(model: nn.Module, riders: Iterable[Method], arguments: TrainingArguments) -> tuple[Method, ...]:
    """The loss of the labels, rightly divided, where nothing else replaces the model's own.

    Stock heads divide by the labels of their own batch, whatever count they are given, and the Trainer then does not divide by
    the accumulation steps either: the gradient came out n times too large. Only next-token losses heed the count.
    """
    if any(rider.replaces_loss for rider in riders) or arguments.label_smoothing_factor or foretells_next(model):
        return ()
    return (Distill.model_validate({"terms": ["task"]}),)


@contextmanager
def _returning_attentions(model: Any, riders: Iterable[Method]) -> Iterator[None]:
    """A recipe's model is ours: terms on attention maps get the implementation that returns them, while training lasts."""
    used = getattr(model.config, "_attn_implementation", "eager")
    if used == "eager" or not any(rider.wants_attentions for rider in riders):
        yield
        return
    model.set_attn_implementation("eager")
    try:
        yield
    finally:
        model.set_attn_implementation(used)


def thinned(history: list[dict[str, Any]]) -> Curve:
    """The losses that a Trainer logged, as `Row` keeps them: of many, neighbours are averaged; without those that are no
    numbers."""
    found = [(int(one["step"]), float(one["loss"])) for one in history if "loss" in one and math.isfinite(float(one["loss"]))]
    width = -(-len(found) // CURVE) or 1
    parts = [found[start : start + width] for start in range(0, len(found), width)]
    return [(part[-1][0], sum(loss for _, loss in part) / len(part)) for part in parts]


def transformers_set_seed(seed: int) -> None:
    from transformers import set_seed

    set_seed(seed)


def has_bf16() -> bool:
    """Whether matrix products in bfloat16 run in hardware here."""
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return bool(torch.cpu._is_avx512_bf16_supported())


def _trainer(model: nn.Module, arguments: TrainingArguments, task: Any, tick: Any) -> Trainer:
    trainer = Trainer(
        model=model,
        args=arguments,
        train_dataset=task.train_dataset,
        eval_dataset=task.eval_dataset,
        data_collator=task.collator,
        processing_class=task.processor,
        callbacks=[ticking := Ticking(tick), _Bar()],
    )
    ticking.go_first(trainer.callback_handler)
    trainer.remove_callback(PrinterCallback)
    trainer.remove_callback(ProgressCallback)
    return trainer


class _Bar(TrainerCallback):
    """One progress bar a training, with the loss, instead of lines of dictionaries."""

    def __init__(self) -> None:
        self._bar: Any = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.is_local_process_zero:
            self._bar = progress(what="training", total=state.max_steps)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self._bar is not None:
            self._bar.update(1)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        if self._bar is not None and logs and "loss" in logs:
            self._bar.set_postfix(loss=f"{float(logs['loss']):.3f}", refresh=False)

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self._bar is not None:
            self._bar.close()
