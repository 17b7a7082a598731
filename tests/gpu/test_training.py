"""Training on the GPU: one step there is one step on a CPU; half precision, riders, low-bit teachers, codes below adapters."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import Trainer

from hfcompress import (
    Adapters,
    CompressionCallback,
    Distill,
    Heal,
    LowRank,
    PruneHeads,
    PruneNeurons,
    PruneWeights,
    Quantize,
    QuantizeAware,
)
from hfcompress.checkpoint.artifact import save
from hfcompress.checkpoint.proof import difference
from hfcompress.layers import holds_codes
from hfcompress.tasks.pretrained import open_model
from tests.distillation.lessons import LESSONS, Rows, pupil
from tests.gpu.place import DEVICE, auto, logits, made
from tests.run.test_train import Rows as FewRows
from tests.run.test_train import arguments

ROOT = Path(__file__).parents[2]
PRECISIONS: list[dict[str, bool]] = [{}, {"bf16": True}, {"fp16": True}]
RIDERS: dict[str, list[Any]] = {
    "heads and neurons": [PruneHeads(0.5, samples=8), PruneNeurons(0.5, round_to=1, samples=8)],
    "weights": [PruneWeights(0.5)],
    "weights, by data": [PruneWeights(pattern="2:4", scores="sparsegpt", samples=8)],
    "codes": [QuantizeAware(2, group_size=16, embeddings=4)],
    "factors": [LowRank(rank=4)],
    "adapters": [Adapters(r=4)],
}


def trained(model: Any, rows: Any, methods: list[Any], folder: Path, steps: int = 6, **more: Any) -> list[float]:
    """Train on the GPU; the losses."""
    on_cpu = DEVICE.type == "cpu" and {"use_cpu": True, "fp16": False}
    asked = {"optim": "adamw_torch", "learning_rate": 1e-3, "logging_steps": 1, "use_cpu": False, **more, **(on_cpu or {})}
    work = arguments(folder, 8, max_steps=steps, **asked)
    trainer = Trainer(model=model, args=work, train_dataset=rows, callbacks=[CompressionCallback(*methods)])
    trainer.train()
    trainer.accelerator.unwrap_model(model, keep_fp32_wrapper=False)  # accelerate leaves its autocast on the forward
    assert {parameter.device for parameter in model.parameters()} == {DEVICE}
    return [line["loss"] for line in trainer.state.log_history if "loss" in line]


@pytest.mark.parametrize("lesson", LESSONS)
def test_one_step_of_distillation_is_that_of_a_cpu(lesson: str, tmp_path: Path) -> None:
    found = []
    for use_cpu in (True, False):
        student, teacher = pupil(lesson), pupil(lesson, seed=1)
        own = {"number": ["task", "logits_mse"], "embeddings": ["embedding", "hidden_mse"]}
        terms = own.get(lesson, ["kl", "task", {"hidden_mse": {"layers": "even"}}])
        work = arguments(tmp_path, 8, learning_rate=0.1, use_cpu=use_cpu or DEVICE.type == "cpu")
        method = CompressionCallback(Distill(teacher, terms=terms))
        Trainer(model=student, args=work, train_dataset=Rows(lesson), callbacks=[method]).train()
        found.append({name: tensor.detach().cpu() for name, tensor in student.named_parameters()})
    before = dict(pupil(lesson).named_parameters())
    moved = {name: tensor - before[name].detach() for name, tensor in found[0].items()}
    size = torch.cat([one.flatten() for one in moved.values()]).norm()
    apart = torch.cat([(found[1][name] - tensor).flatten() for name, tensor in found[0].items()]).norm()
    assert size > 0 and apart < 1e-2 * size


@pytest.mark.parametrize("precision", PRECISIONS, ids=str)
@pytest.mark.parametrize("riders", RIDERS)
@pytest.mark.parametrize("kind", ["llama", "bert"])
def test_riders_and_a_teacher_in_half_precision(kind: str, riders: str, precision: dict[str, bool], tmp_path: Path) -> None:
    model, teacher = made(kind), made(kind, seed=1)
    losses = trained(model, FewRows(kind), [Distill(teacher), *RIDERS[riders]], tmp_path / "work", **precision)
    assert len(losses) == 6 and all(loss == loss and 0 < loss < 1e3 for loss in losses)
    expected = logits(model, kind)
    assert expected.isfinite().all()
    save(model, None, tmp_path / "out")
    assert torch.equal(logits(open_model(tmp_path / "out", auto(kind), DEVICE), kind), expected)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("kind", ["llama", "bert"])
def test_a_teacher_in_few_bits_teaches_nearly_the_same(kind: str, bits: int, tmp_path: Path) -> None:
    made(kind, seed=1).save_pretrained(tmp_path / "teacher")
    losses = [
        trained(made(kind), FewRows(kind), [Distill(str(tmp_path / "teacher"), alpha=1.0, **few)], tmp_path, steps=2)[0]
        for few in ({}, {"teacher_bits": bits})
    ]
    assert losses[0] != losses[1] and abs(losses[0] - losses[1]) < 0.2 * losses[0]


@pytest.mark.parametrize("precision", PRECISIONS[:2], ids=str)
@pytest.mark.parametrize("quantize", [Quantize(4), Quantize(8), Quantize(4, engine="hfcompress")], ids=str)
def test_adapters_over_codes_learn_and_leave_them(quantize: Quantize, precision: dict[str, bool], tmp_path: Path) -> None:
    """QLoRA."""
    model = made("llama", torch.bfloat16)
    quantize.run(model, None)
    codes = {name: module.weight.detach().clone() for name, module in model.named_modules() if holds_codes(module)}
    adapters = Adapters(r=4, merge=False)
    losses = trained(model, FewRows("llama"), [adapters], tmp_path / "work", 20, learning_rate=1e-2, **precision)
    assert losses[-1] < 0.95 * losses[0]
    held = dict(model.named_modules())
    for name, before in codes.items():
        layer = held[name]
        assert torch.equal(getattr(layer, "base_layer", layer).weight.data, before), name
    expected = logits(model, "llama")
    save(model, None, tmp_path / "out")
    again = open_model(tmp_path / "out", auto("llama"), DEVICE)
    assert difference(logits(again, "llama"), expected) < 2e-2


@pytest.mark.parametrize("bits", [8, 4])
def test_codes_are_healed(bits: int, tmp_path: Path) -> None:
    model, dense = made("llama"), made("llama")
    Quantize(bits).run(model, None)
    losses = trained(model, FewRows("llama"), [Heal(), Distill(dense, alpha=1.0)], tmp_path / "work", 20)
    assert losses[-1] < losses[0]
    expected = logits(model, "llama")
    save(model, None, tmp_path / "out")
    assert torch.equal(logits(open_model(tmp_path / "out", auto("llama"), DEVICE), "llama"), expected)


@pytest.mark.parametrize("kind", ["llama", "bert"])
def test_gradient_checkpointing_changes_nothing(kind: str, tmp_path: Path) -> None:
    terms = ["kl", {"hidden_mse": {"layers": "even"}}]
    losses = [
        trained(made(kind), FewRows(kind), [Distill(made(kind, seed=1), terms=terms)], tmp_path, gradient_checkpointing=is_on)
        for is_on in (False, True)
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


def test_answers_that_were_kept_teach_the_same(tmp_path: Path) -> None:
    made("bert", seed=1).save_pretrained(tmp_path / "teacher")
    cached = {"cache": str(tmp_path / "cache")}
    losses = [
        trained(made("bert"), FewRows("bert"), [Distill(str(tmp_path / "teacher"), terms=["kl", "task"], **more)], tmp_path)
        for more in ({}, cached, cached)
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3) and losses[1] == pytest.approx(losses[2], rel=1e-3)


PROCESSES = """
import os, sys, torch
if "RANK" in os.environ:
    os.environ["LOCAL_RANK"] = "0"  # accelerate and DistributedDataParallel take the GPU of this number
from pathlib import Path
from safetensors.torch import save_file
from transformers import Trainer
from hfcompress import CompressionCallback, Distill, PruneNeurons
from tests.distillation.lessons import Rows, pupil
from tests.run.test_train import arguments
folder = Path(sys.argv[1])
many = int(sys.argv[2])
more = {"ddp_backend": "gloo"} if many > 1 else {}
work = arguments(folder, 8 // many, learning_rate=0.1, use_cpu=sys.argv[3] == "cpu", **more)
model = pupil("sequence")
methods = Distill(pupil("sequence", seed=1)), PruneNeurons(0.5, scores="fisher", samples=8, round_to=1)
Trainer(model=model, args=work, train_dataset=Rows("sequence"), callbacks=[CompressionCallback(*methods)]).train()
assert work.world_size == many
if work.process_index == 0:
    save_file({name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}, folder / f"{many}.st")
"""


def test_two_processes_on_one_gpu_are_one(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(PROCESSES)
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    for many, how in ((1, []), (2, launch)):
        run = subprocess.run(
            [sys.executable, *how, str(script), str(tmp_path), str(many), DEVICE.type],
            capture_output=True,
            text=True,
            timeout=300,
            env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])},
        )
        assert run.returncode == 0, run.stderr[-3000:]
    one, two = load_file(tmp_path / "1.st"), load_file(tmp_path / "2.st")
    assert one.keys() == two.keys()
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, atol=1e-3, rtol=1e-3, msg=name)
