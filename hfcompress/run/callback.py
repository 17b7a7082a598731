"""Methods for training that people have already: the callback and `attach`, for any Trainer.

The Trainer itself is not imported: whatever its class, it is told apart by what it calls.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary, ref

from accelerate.utils import reduce
from safetensors import safe_open
from torch import Tensor, nn
from transformers import TrainerCallback, TrainingArguments
from transformers.trainer_callback import CallbackHandler

from hfcompress.calibration.batches import Batches
from hfcompress.checkpoint.describe import describe
from hfcompress.checkpoint.errors import CompressionError, shown
from hfcompress.methods.base import Method, Tick
from hfcompress.methods.riding import added_by, check_together, leave_loadable, take_places, trained, with_original
from hfcompress.run.sentences import batches_of, check_body
from hfcompress.surgery.modules import body_of, restored_on_error
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
        if method.scheduled and arguments.load_best_model_at_end:
            raise CompressionError(
                f"{method.key()}: load_best_model_at_end would bring back a checkpoint from before its schedule was over; "
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
        if method.holds_layers and arguments.n_gpu > 1:
            raise CompressionError(
                f"{method.key()}: nn.DataParallel, which a Trainer uses on several GPUs in one process, can't copy the layers "
                f"that it holds; start a process for each with torchrun or accelerate launch, or show it one GPU."
            )
        if method.replaces_loss:
            _check_loss(method.key(), arguments)


def _check_loss(key: str, arguments: Any) -> None:
    """Whether the loss that a method puts into the model's output is the one that will be trained on."""
    if arguments.n_gpu > 1:
        raise CompressionError(
            f"{key}: one process with {arguments.n_gpu} GPUs (DataParallel) has one teacher for all; start "
            f"a process a GPU with `accelerate launch` or `torchrun`, or set CUDA_VISIBLE_DEVICES to one."
        )
    kinds, loss_type = [kind.__name__ for kind in type(arguments).__mro__], getattr(arguments, "loss_type", "nll")
    if loss_type != "nll" and "SFTConfig" in kinds:  # TRL's
        raise CompressionError(f"{key}: loss_type {loss_type!r} would weigh this loss once more; set loss_type='nll'.")
    if loss_type != "nll":
        raise CompressionError(
            f"{key}: under {kinds[0]} the Trainer makes its own loss ({shown(loss_type)}) of the logits and would not train on "
            f"this one; distil in a training of its own, with Trainer or SFTTrainer, before or after."
        )
    if arguments.label_smoothing_factor:
        raise CompressionError(f"{key}: label_smoothing_factor takes the labels away and would ignore this loss; set it to 0.")


def shards(arguments: TrainingArguments) -> bool:
    """Whether FSDP was asked for, by the arguments or by `accelerate launch`."""
    return bool(arguments.fsdp) or os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"


class CompressionCallback(Ticking):
    """Methods for a Trainer of your own: `Trainer(..., callbacks=[CompressionCallback(Distill(teacher), PruneHeads(0.3))])`.

    Methods that add parameters act when the Trainer is built, others when training begins, each finishes when it ends (after
    the best model was loaded). Then the model's config tells its new structure, so `trainer.save_model()` and `push_to_hub`
    save something that plain `from_pretrained` loads. On an error of a method, the model is as it was before any of them.

    Nobody tells a callback that a training was interrupted: until its Trainer is gone, or the model is trained anew, the model
    computes and saves what it had become.

    A Trainer refuses a model that was loaded in low bits until adapters are on it, before it asks any callback: give the
    callback the model, `CompressionCallback(Adapters(), model=model)`, and it puts them on at once.
    """

    def __init__(self, *methods: Method, model: Any = None) -> None:
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
        self._model: Any = lambda: None
        self._batches, self._before = Batches(), dict[str, nn.Parameter]()
        check_together(methods)
        if model is not None:
            self.build(None, model, None, Batches())

    def on_init_end(self, args: Any, state: Any, control: Any, model: Any = None, optimizer: Any = None, **_: Any) -> None:
        if self._phase != "new" and (self._phase != "given" or body_of(model) is not self._model()):
            raise CompressionError("CompressionCallback: it belongs to one Trainer already; make a new one for this Trainer.")
        self._go_first_if_called()
        if self._phase == "given":
            self._take_up(args, optimizer)
        else:
            self.build(args, model, optimizer, Batches())

    def _take_up(self, args: Any, optimizer: Any = None) -> None:
        """A Trainer has come to the model that was given."""
        self._phase, before, self._before = "built", self._before, {}
        with self._given_up_on_error():
            check_riders(self._methods, args)
            if optimizer is not None:
                take_places(optimizer, before, self._model())

    def build(self, args: Any, model: Any, optimizer: Any, batches: Batches) -> None:
        """Before an optimizer is built, or into one that is: the original is kept, new parameters are put in. `args`: the
        Trainer's, None as long as there is none."""
        self._phase, self._batches = "given" if args is None else "built", batches
        if args is not None:
            check_riders(self._methods, args)
        body = body_of(model)
        check_body(model, body, self._methods)
        self._model = ref(body)
        with self._given_up_on_error():
            self._stack.enter_context(restored_on_error(body))
            self._stack.push(lambda kind, *_: leave_loadable(body, self._methods) if kind is None else None)
            with_original(body, self._methods, batches)
            before = trained(body)
            self._enter(body, batches, adding=True)
            if optimizer is not None:
                take_places(optimizer, before, body)
            self._before = before if args is None else {}
            held = any(method.holds_layers for method in self._methods)  # and are their own again when training ends
            if added_by(self._methods) and not held and not getattr(body, "peft_config", None):
                describe(body)

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **given: Any) -> None:
        if self._phase == "training" and args.auto_find_batch_size:
            return  # it begins again with a smaller batch, and all is in place
        if self._phase == "new":
            if who := added_by(self._methods):
                raise CompressionError(
                    f"{who}: the callback was added after the Trainer was built, and the optimizer exists; use "
                    f"attach(trainer, ...) before train(), or Trainer(..., callbacks=[CompressionCallback(...)])."
                )
            self._go_first_if_called()
            self.build(args, model, None, Batches())
        body = body_of(model)
        if self._phase == "given" and body is self._model():
            self._take_up(args)
        if self._phase != "training" and body is not self._model():
            self._begin_on(args, model)
        if self._phase != "built":
            raise CompressionError(
                "CompressionCallback: its methods are done after one train(); make a new Trainer and callback to go on."
            )
        self._phase, self._state = "training", state
        with self._given_up_on_error():
            self._begin(args, state, body, given)

    def _begin_on(self, args: Any, model: Any) -> None:
        """`Trainer(model_init=...)` makes a new model for every train(): what only rides along rides on each."""
        if who := added_by(self._methods):
            with self._given_up_on_error():
                raise CompressionError(
                    f"{who}: Trainer(model_init=...) builds the model anew in train(), without what was put into it; give it "
                    f"model=model_init() instead."
                )
        self._stack = ExitStack()  # nothing was done to the model before
        self.build(args, model, None, Batches())

    def _begin(self, args: Any, state: Any, model: Any, given: dict[str, Any]) -> None:
        if state.global_step and any(method.fades for method in self._methods):
            raise CompressionError(
                "resume_from_checkpoint: which units fade was chosen when training began, and a checkpoint does not hold it; "
                "train from the start, or prune before training."
            )
        batches = batches_of(given.get("train_dataloader"))(
            given.get("train_dataloader"), self._batches.original, given.get("processing_class"), bool(state.global_step)
        )
        if state.global_step:
            _read_back(model, Path(args.output_dir) / f"checkpoint-{state.global_step}")
        beside = [one for known in _RIDING.get(model, ()) if (one := known()) is not None]
        for other in [one for one in beside if one._state is not state]:
            other._interrupt()
            beside.remove(other)
        check_together([method for callback in (*beside, self) for method in callback._methods])
        _RIDING[model] = [ref(one) for one in (*beside, self)]
        self._enter(model, batches, adding=False)

    def _enter(self, model: Any, task: Any, adding: bool) -> None:
        for method in self._methods:
            if method.adds_parameters == adding:
                tick = (self._stack if adding else self._training).enter_context(method.applied(model, task))
                if tick is not None:
                    self._ticks.append(tick)

    def on_step_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        with self._given_up_on_error():
            super().on_step_end(args, state, control, **given)

    def on_train_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        self._phase, self._ticks = "done", []
        model = body_of(model)
        if args.load_best_model_at_end and state.best_model_checkpoint:
            _read_back(model, Path(state.best_model_checkpoint))
        with self._given_up_on_error():
            self._training.close()
            self._stack.close()
        _RIDING.pop(model, None)

    @contextmanager
    def _given_up_on_error(self) -> Iterator[None]:
        """Whatever fails here, all methods are over, and the model is as it was before them."""
        try:
            yield
        except BaseException as error:
            self._phase, self._ticks = "done", []
            for stack in (self._training, self._stack):
                stack.__exit__(type(error), error, error.__traceback__)
            raise

    def _interrupt(self) -> None:
        """Its training raised, which nobody tells a callback: gates and hooks come off, and nothing is cut."""
        self._phase, self._ticks = "done", []
        self._training.__exit__(InterruptedError, InterruptedError(), None)

    def _go_first_if_called(self) -> None:
        """A Trainer tells its callbacks everything but where they stand; whoever wants to be logged must stand first."""
        frame = inspect.currentframe()
        caller = frame and frame.f_back and frame.f_back.f_back
        handler = caller and caller.f_locals.get("self")
        if isinstance(handler, CallbackHandler) and self in handler.callbacks:
            self.go_first(handler)


_RIDING: WeakKeyDictionary[nn.Module, list[ref[CompressionCallback]]] = WeakKeyDictionary()
"""Whose methods are on a model while it trains: they live as long as their Trainer, and what they hold is free then."""


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
    who = added_by(methods)
    if trainer.optimizer is not None and trainer.state.max_steps and who:
        raise CompressionError(
            f"attach: {who}: the optimizer of a train() that is over would not train new parameters; attach before train()."
        )
    if getattr(trainer, "model_init", None) is not None and who:
        raise CompressionError(
            f"attach: {who}: Trainer(model_init=...) builds the model anew in train(), without what was put into it; give it "
            f"model=model_init() instead."
        )
    if trainer.compute_loss_func is not None and any(method.replaces_loss for method in methods):
        raise CompressionError(
            "attach: the Trainer's compute_loss_func would ignore the distillation loss; build it without one."
        )
    callback = CompressionCallback(*methods)
    loader = trainer.get_train_dataloader() if who and trainer.train_dataset is not None else None
    callback.build(trainer.args, trainer.model, trainer.optimizer, batches_of(loader)(loader))
    trainer.add_callback(callback)
    callback.go_first(trainer.callback_handler)
    return trainer
