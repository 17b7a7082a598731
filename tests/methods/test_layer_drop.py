"""layer_drop: layers are left out as often as asked, while training alone, and every weight still has its gradient."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from hfcompress import CompressionError, LayerDrop, riding
from hfcompress.surgery.depth.stacks import layer_stacks
from tests.calibration.test_reconstruct import batches
from tests.tiny import tiny_model

KINDS = ("bert", "llama", "gpt2", "t5", "bart", "vit")


def layers_of(model: Any) -> list[Any]:
    return [model.get_submodule(f"{stack.name}.{place}") for stack in layer_stacks(model) for place in range(stack.count)]


def moved(model: Any, batch: Any, runs: int) -> list[list[bool]]:
    """Whether each layer changed what it was given, run by run."""
    found: list[list[bool]] = []

    def look(_: Any, args: Any, kwargs: Any, output: Any) -> None:
        given = args[0] if args else kwargs["hidden_states"]
        said = output[0] if isinstance(output, tuple) else output
        found[-1].append(not torch.equal(given, said))

    handles = [layer.register_forward_hook(look, with_kwargs=True) for layer in layers_of(model)]
    with torch.no_grad():
        for _ in range(runs):
            found.append([])
            model(**batch)
    for handle in handles:
        handle.remove()
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_layers_are_left_out_as_often_as_asked_while_training(kind: str) -> None:
    model, batch = tiny_model(kind), batches(kind)[0]
    torch.manual_seed(0)
    with riding(model, [LayerDrop(0.5)], None):
        assert all(all(run) for run in moved(model.eval(), batch, 3)), "nothing is left out of what is scored"
        shares = [sum(run) / len(run) for run in moved(model.train(), batch, 60)]
        assert 0.35 < sum(shares) / len(shares) < 0.65
        assert len(set(shares)) > 1
    assert all(all(run) for run in moved(model.train(), batch, 5)), "and nothing afterwards"


def test_rates_grow_with_depth() -> None:
    model, batch = tiny_model("bert", layers=4), batches("bert")[0]
    torch.manual_seed(0)
    with riding(model, [LayerDrop(0.8, grows=True)], None):
        runs = moved(model.train(), batch, 150)
    left_out = [1 - sum(run[place] for run in runs) / len(runs) for place in range(4)]
    assert left_out == sorted(left_out)
    assert all(abs(found - 0.8 * (place + 1) / 4) < 0.12 for place, found in enumerate(left_out))


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_every_weight_has_a_gradient_of_zero_where_its_layer_was_left_out(kind: str, checkpointing: bool) -> None:
    model, batch = tiny_model(kind).train(), dict(batches(kind)[0])
    if checkpointing:
        model.gradient_checkpointing_enable()
    whole = tiny_model(kind).train()
    whole(**batch).logits.square().mean().backward()
    expected = {name for name, parameter in whole.named_parameters() if parameter.grad is not None}
    with riding(model, [LayerDrop(0.999)], None):
        torch.manual_seed(0)
        model(**batch).logits.square().mean().backward()
    found = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert found == expected
    for layer in layers_of(model):
        assert all(not parameter.grad.any() for parameter in layer.parameters() if parameter.grad is not None)


def test_only_the_stack_that_is_named_loses_layers() -> None:
    model, batch = tiny_model("t5"), batches("t5")[0]
    with riding(model, [LayerDrop(0.999, stack="decoder")], None):
        (run,) = moved(model.train(), batch, 1)
    half = len(run) // 2
    sides = dict(zip([stack.side for stack in layer_stacks(model)], (run[:half], run[half:]), strict=True))
    assert all(sides["encoder"]) and not any(sides["decoder"])
    with pytest.raises(
        CompressionError, match="layer_drop: stack 'middle' is none of T5ForConditionalGeneration's; possible are all"
    ):
        riding(model, [LayerDrop(stack="middle")], None).__enter__()


def test_an_error_takes_the_hooks_off() -> None:
    model = tiny_model("bert")
    with pytest.raises(RuntimeError, match="stop"), riding(model, [LayerDrop(0.5)], None):
        raise RuntimeError("stop")
    assert not any(layer._forward_hooks for layer in layers_of(model))
