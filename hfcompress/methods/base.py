"""The protocol: a step edits the model in place; a method is a step with a pause in the middle, where training can happen."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from hfcompress.calibration.batches import Batches
from hfcompress.checkpoint.describe import describe
from hfcompress.checkpoint.fields import Named
from hfcompress.checkpoint.quantizer import forget_reading
from hfcompress.surgery.modules import restored_on_error

Tick = Callable[[float], Mapping[str, Tensor] | None]
"""Called after every optimizer step with the progress of training, 0..1. Returns what is worth logging, a name to a scalar."""


@dataclass(frozen=True)
class LayerEdits:
    """What a method makes of one model, where it edits each layer by what that layer alone holds."""

    names: Collection[str]
    """The layers that it edits by their own weight."""
    edit: Callable[[str], None]
    """Edit the layer of this name, whose tensors are there; one that the method leaves alone stays."""
    waiting: Collection[str]
    """The layers that it edits only when the whole model is there: those that share a weight."""
    rest: Callable[[Collection[str]], None]
    """Edit what is left, when the layers of these names are done and the whole model is there."""


class Step(Named):
    """Anything a recipe can list: `run` edits the model in place."""

    def run(self, model: nn.Module, task: Any) -> None:
        raise NotImplementedError

    @property
    def label(self) -> str:
        """A few words for a table: the key and its first field, "prune_heads 0.5"."""
        first = next(iter(self.model_dump(mode="json").values()), None)
        return f"{self.key()} {first}" if isinstance(first, int | float | str) else self.key()


class Method(Step):
    """A step told as one story with a pause in the middle.

    What drivers, recipes, checks and cards must know of a method are facts that its class declares; they never name one.
    """

    edits: ClassVar[frozenset[str]] = frozenset()
    """What it changes: the `loss`; rows and columns (`units`), whole `layers` or experts, `tokens`; `values` of weights;
    what stands in a layer's place: `factors`, `codes`, an `adapter`; the `dtype`; the `cache` of generation."""
    needs_dense: ClassVar[bool] = False
    """Whether it can't be applied to a model whose layers are codes."""
    needs_units: ClassVar[bool] = False
    """Whether it works on heads or neurons, which must be proven of the architecture."""
    needs_training: ClassVar[bool] = False
    """Whether it is useless as a step of its own."""
    adds_parameters: ClassVar[bool] = False
    """Whether it changes which parameters there are before training, so that it must act before an optimizer is built."""
    chooses_trained: ClassVar[bool] = False
    """Whether it says which parameters are trained, and freezes all others, so that these may be codes."""
    scheduled: ClassVar[bool] = False
    """Whether it goes on changing the model while training lasts, so that no earlier checkpoint may replace the last one."""
    fades: ClassVar[bool] = False
    """Whether what it chose when training began is in no checkpoint, so that training can't be resumed from one."""
    holds_layers: ClassVar[bool] = False
    """Whether layers are others while training lasts, of the sizes that they had when it began."""
    lost_in_training: ClassVar[bool] = False
    """Whether training undoes what it did, unless it rides along."""
    rides: ClassVar[bool] = True
    """Whether training may happen in its pause."""
    writes: ClassVar[frozenset[str]] = frozenset()
    """Its fields that name a file it writes, not one it reads."""
    tag: ClassVar[str] = ""
    """How the Hub calls models that it was applied to."""

    @property
    def replaces_loss(self) -> bool:
        """Whether training minimises its loss instead of the model's own."""
        return "loss" in self.edits

    @property
    def has_teacher(self) -> bool:
        """Whether it learns from another model, without which training can be tried as well."""
        return False

    @property
    def learns_labels(self) -> bool:
        """Whether its loss has a part that needs labels."""
        return False

    @property
    def keeps_adapter(self) -> bool:
        """Whether it leaves an adapter beside the model's weights."""
        return False

    @property
    def repairs(self) -> bool:
        """Whether it sets weights to zero before training, for others to take over."""
        return False

    @property
    def computes_in(self) -> str | None:
        """The floating dtype that the model computes in afterwards, where the method decides that."""
        return None

    @property
    def wants_original(self) -> bool:
        """Whether it asks for `task.original`, a copy of the model as no method has touched it."""
        return False

    @property
    def wants_labels(self) -> bool:
        """Whether it needs a loss before training begins, to choose by."""
        return False

    @property
    def wants_attentions(self) -> bool:
        """Whether the model must return its attention maps, which only the eager implementation does."""
        return False

    @property
    def by_layer(self) -> bool:
        """Whether it edits each layer by what that layer alone holds, so that a model can be edited while it is read."""
        return False

    def layer_edits(self, model: nn.Module) -> LayerEdits:
        """What it will do to this model, which may be on the meta device yet, where it is `by_layer`."""
        raise NotImplementedError

    def applied(self, model: nn.Module, task: Any) -> AbstractContextManager[Tick | None]:
        """Before the yield: choose, insert, freeze. The pause: training, calling the yielded tick. After: cut, merge, pack.

        On an error, whoever drives it gives the model back as it was (`restored_on_error`): what is left to a method then are
        its hooks, and values that it wrote in place.
        """
        raise NotImplementedError

    def run(self, model: nn.Module, task: Any) -> None:
        """`task`: a Task, any iterable of batches (dicts of tensors), or None for methods that need no data.

        Afterwards `model.save_pretrained` writes what loads.
        """
        task = task if task is None or hasattr(task, "batches") else Batches(task)
        with restored_on_error(model), self.applied(model, task) as tick:
            if tick is not None:
                tick(1.0)
        leave_loadable(model, [self])


def leave_loadable(model: Any, methods: Iterable[Method]) -> None:
    """Have the config tell what methods made of the model, so that `save_pretrained` writes what loads.

    A model that carries an adapter writes that adapter alone; a loss changes nothing.
    """
    if not getattr(model, "peft_config", None) and not all(method.replaces_loss for method in methods):
        describe(model)
        forget_reading(model)
        # It is no longer the checkpoint that it came from: an adapter trained on it later must not name that as its base.
        model.name_or_path = ""


def every_method(of: type[Method] = Method) -> list[type[Method]]:
    """Every method there is: the classes that are nobody's base."""
    return [one for sub in of.__subclasses__() for one in (every_method(sub) or [sub])]
