"""Methods for training that people have already: the callback and `attach`, for any Trainer.

The Trainer itself is not imported: whatever its class, it is told apart by what it calls.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Iterable
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

from accelerate.utils import reduce
from safetensors import safe_open
from torch import Tensor, nn
from transformers import TrainerCallback, TrainingArguments
from transformers.trainer_callback import CallbackHandler

from hfcompress.calibration.batches import Batches
from hfcompress.checkpoint.describe import describe
from hfcompress.checkpoint.errors import CompressionError
from hfcompress.methods.base import Method, Tick
from hfcompress.methods.riding import check_together, leave_loadable, with_original
from hfcompress.tasks.pretrained import open_model


class Ticking(TrainerCallback):
    """Calls ticks after every optimizer step, and logs what they tell beside the loss: the mean since it was last logged."""

    def __init__(self, *ticks: Tick) -> None:
        self._ticks, self._told, self._ticked = list(ticks), dict[str, Tensor](), dict[str, int]()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        for tick in self._ticks:
            for name, value in (tick(state.global_step / state.max_steps) or {}).items():
                self._told[name] = self._told[name] + value if name in self._told else value
                self._ticked[name] = self._ticked.get(name, 0) + 1

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        if logs is None or "loss" not in logs:
            return
        means = {name: total / self._ticked[name] for name, total in self._told.items()}
        if args.world_size > 1:
            means = reduce(means, "mean")
        told = {name: float(value) for name, value in means.items()}
        logs.update(told)
        state.log_history[-1].update(told)  # it got a copy before any callback was asked
        self._told.clear()
        self._ticked.clear()

    def go_first(self, handler: CallbackHandler) -> None:
        """Before trackers, which send off the logs as they find them."""
        handler.callbacks.remove(self)
        handler.callbacks.insert(0, self)


def check_riders(methods: Iterable[Method], arguments: TrainingArguments) -> None:
    """What a Trainer's arguments and the methods must not ask of each other."""
    for method in methods:
        if method.fades and arguments.load_best_model_at_end:
            raise CompressionError(
                f"{method.key()}: load_best_model_at_end would bring back a checkpoint from before its units had faded out; "
                f"set load_best_model_at_end=False, or prune before training."
            )
        if not method.replaces_loss and shards(arguments):
            raise CompressionError(
                f"{method.key()}: FSDP leaves every process a piece of each weight, and only distill may ride along; "
                f"use DistributedDataParallel, or a step of its own before or after this training."
            )
        if "adapter" in method.edits and arguments.load_best_model_at_end:
            raise CompressionError(
                f"{method.key()}: checkpoints hold the adapter alone, and load_best_model_at_end looks for models; set it to "
                f"False."
            )
        if method.replaces_loss and arguments.n_gpu > 1:
            raise CompressionError(
                f"{method.key()}: one process with {arguments.n_gpu} GPUs (DataParallel) has one teacher for all; start "
                f"a process a GPU with `accelerate launch` or `torchrun`, or set CUDA_VISIBLE_DEVICES to one."
            )
        if method.replaces_loss and getattr(arguments, "loss_type", "nll") != "nll":  # TRL's SFTConfig
            raise CompressionError(
                f"{method.key()}: loss_type {arguments.loss_type!r} would weigh this loss once more; "  # type: ignore[attr-defined]
                f"set loss_type='nll'."
            )
        if method.replaces_loss and arguments.label_smoothing_factor:
            raise CompressionError(
                f"{method.key()}: label_smoothing_factor takes the labels away and would ignore this loss; set it to 0."
            )


def shards(arguments: TrainingArguments) -> bool:
    """Whether FSDP was asked for, by the arguments or by `accelerate launch`."""
    return bool(arguments.fsdp) or os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"


class CompressionCallback(Ticking):
    """Methods for a Trainer of your own: `Trainer(..., callbacks=[CompressionCallback(Distill(teacher), PruneHeads(0.3))])`.

    Methods that add parameters act when the Trainer is built, others when training begins, each finishes when it ends (after
    the best model was loaded). Then the model's config tells its new structure, so `trainer.save_model()` and `push_to_hub`
    save something that plain `from_pretrained` loads.
    """

    def __init__(self, *methods: Method) -> None:
        for method in methods:
            if not isinstance(method, Method):
                raise CompressionError(
                    f"CompressionCallback: {method!r} is no method; give method objects such as PruneHeads(ratio=0.3)."
                )
        self._methods = methods
        super().__init__()
        self._stack, self._training = ExitStack(), ExitStack()
        self._state: Any = None
        self._phase = "new"
        self._batches = Batches()
        check_together(methods)

    def on_init_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        if self._phase != "new":
            raise CompressionError("CompressionCallback: it belongs to one Trainer already; make a new one for this Trainer.")
        self._phase = "built"
        caller = inspect.currentframe()
        handler = caller and caller.f_back and caller.f_back.f_locals.get("self")
        if isinstance(handler, CallbackHandler) and self in handler.callbacks:
            # A Trainer tells its callbacks everything but where they stand; whoever wants to be logged must stand first.
            self.go_first(handler)
        check_riders(self._methods, args)
        with_original(model, self._methods, self._batches)
        self._enter(model, self._batches, adding=True)
        if any(method.adds_parameters for method in self._methods) and not getattr(model, "_hf_peft_config_loaded", False):
            describe(model)

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **given: Any) -> None:
        if self._phase == "training" and args.auto_find_batch_size:
            return  # it begins again with a smaller batch, and all is in place
        if self._phase != "built":
            raise CompressionError(
                "CompressionCallback: its methods are done after one train(); make a new Trainer and callback to go on."
            )
        self._phase = "training"
        if state.global_step and any(method.fades for method in self._methods):
            raise CompressionError(
                "resume_from_checkpoint: which units fade was chosen when training began, and a checkpoint does not hold it; "
                "train from the start, or prune before training."
            )
        batches = Batches(
            given.get("train_dataloader"), self._batches.original, given.get("processing_class"), bool(state.global_step)
        )
        model = _unwrapped(model)
        if state.global_step:
            _read_back(model, Path(args.output_dir) / f"checkpoint-{state.global_step}")
        self._state, beside = state, _RIDING.setdefault(model, [])
        for other in [one for one in beside if one._state is not state]:
            other._abandon(beside)
        check_together([method for callback in (*beside, self) for method in callback._methods])
        beside.append(self)
        self._enter(model, batches, adding=False)

    def _enter(self, model: Any, task: Any, adding: bool) -> None:
        for method in self._methods:
            if method.adds_parameters == adding:
                tick = (self._stack if adding else self._training).enter_context(method.applied(model, task))
                if tick is not None:
                    self._ticks.append(tick)

    def on_train_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        self._phase = "done"
        self._ticks = []
        model = _unwrapped(model)
        if args.load_best_model_at_end and state.best_model_checkpoint:
            _read_back(model, Path(state.best_model_checkpoint))
        self._training.close()
        self._stack.close()
        _RIDING.pop(model, None)
        leave_loadable(model, self._methods)

    def _abandon(self, beside: list[CompressionCallback]) -> None:
        """Its training raised, which nobody tells a callback: gates and hooks come off, and nothing is cut."""
        beside.remove(self)
        self._training.__exit__(InterruptedError, InterruptedError(), None)


_RIDING: WeakKeyDictionary[nn.Module, list[CompressionCallback]] = WeakKeyDictionary()
"""Whose methods are on a model while it trains."""


def _read_back(model: Any, folder: Path) -> None:
    """Load a checkpoint that the Trainer could not: transformers saves some architectures (ViT, DeiT, Swin) under older names,
    and its Trainer looks for the new ones and goes on with the weights it had (transformers issue 48805)."""
    stored: set[str] = set()
    for file in folder.glob("model*.safetensors"):
        with safe_open(file, framework="pt") as shard:
            stored |= set(shard.keys())
    if stored - set(model.state_dict()):
        model.load_state_dict(open_model(folder, type(model), "cpu").state_dict())


def attach(trainer: Any, *methods: Method) -> Any:
    """Apply methods to a Trainer that was already built: `attach(trainer, Distill(teacher), PruneHeads(ratio=0.3))`."""
    if trainer.optimizer is not None and any(method.adds_parameters for method in methods):
        raise CompressionError(
            "attach: the optimizer exists already and would not train new parameters; attach before train()."
        )
    if trainer.compute_loss_func is not None and any(method.replaces_loss for method in methods):
        raise CompressionError(
            "attach: the Trainer's compute_loss_func would ignore the distillation loss; build it without one."
        )
    callback = CompressionCallback(*methods)
    callback.on_init_end(trainer.args, trainer.state, trainer.control, model=trainer.model)
    trainer.add_callback(callback)
    callback.go_first(trainer.callback_handler)
    return trainer


def _unwrapped(model: Any) -> Any:
    """The user's own model inside DistributedDataParallel and the like."""
    while hasattr(model, "module") and isinstance(model.module, nn.Module):
        model = model.module
    return model
