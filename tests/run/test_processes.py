"""Several processes: the files of scripts/accelerate, a recipe on two CPU processes, distillation under FSDP, what is refused."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import launch_command_parser
from accelerate.utils import DistributedType
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForSequenceClassification, Trainer

from hfcompress import CompressionCallback, CompressionError, Distill, PruneNeurons, Train
from hfcompress.results.report import Report
from tests import fresh
from tests.distillation.lessons import Rows, pupil
from tests.run.test_train import arguments, env
from tests.tiny import tiny_checkpoint, tiny_texts

ROOT = Path(__file__).parents[2]
CONFIGS = {path.stem: path for path in sorted((ROOT / "scripts" / "accelerate").glob("*.yaml"))}
KINDS = {
    "multi-gpu": DistributedType.MULTI_GPU,
    "fsdp": DistributedType.FSDP,
    "deepspeed-zero2": DistributedType.DEEPSPEED,
    "two-cpu": DistributedType.MULTI_GPU,
}


@pytest.mark.parametrize("name", KINDS)
def test_accelerate_knows_every_key_of_a_config(name: str) -> None:
    config = load_config_from_file(str(CONFIGS[name]))  # raises for an unknown key, but for those of the inner tables
    assert config.distributed_type == KINDS[name] and config.num_processes == 2
    known = vars(launch_command_parser().parse_args(["script.py"]))
    for inner in (config.fsdp_config, config.deepspeed_config):
        assert set(inner) <= set(known)


def test_every_config_is_tested_and_tells_its_command() -> None:
    assert set(CONFIGS) == set(KINDS)
    for name, path in CONFIGS.items():
        head = [line for line in path.read_text().splitlines() if line.startswith("#")]
        assert any(f"accelerate launch --config_file scripts/accelerate/{name}.yaml train.py" in line for line in head)
        assert all(any(line.startswith(f"# {word}") for line in head) for word in ("A recipe:", "Buys:", "Costs:"))


def test_a_recipe_distils_on_two_processes_through_the_config(tmp_path: Path) -> None:
    tiny_texts(tmp_path / "texts", each=16)
    tiny_checkpoint(tmp_path / "bert", "bert")
    (tmp_path / "recipe.yaml").write_text(
        f"model: {tmp_path / 'bert'}\n"
        f"task: {{name: text-classification, dataset: {tmp_path / 'texts'}, max_length: 32}}\n"
        f"steps: [{{train: {{epochs: 1, bf16: false, learning_rate: 1.0e-3, with: [distill]}}}}]\n"
    )
    # Python reads this before anything else: which process it is, by what the launcher told it.
    (tmp_path / "sitecustomize.py").write_text(
        "import os, pathlib\n"
        "if 'RANK' in os.environ and 'hfcompress' in ' '.join(__import__('sys').orig_argv):\n"
        f"    pathlib.Path({str(tmp_path)!r}, 'rank-' + os.environ['RANK']).write_text(os.environ['WORLD_SIZE'])\n"
    )
    said = re.search(r"# A recipe: +(accelerate launch .*)", CONFIGS["two-cpu"].read_text())
    assert said is not None
    command = said[1].replace("RECIPE.yaml", str(tmp_path / "recipe.yaml")).replace("OUT", str(tmp_path / "out")).split()
    run = subprocess.run(
        [sys.executable, "-m", "accelerate.commands.launch", *command[2:]],
        capture_output=True,
        text=True,
        timeout=300,
        cwd=ROOT,
        env={**env(f"{tmp_path}:{ROOT}"), "CUDA_VISIBLE_DEVICES": "", "COLUMNS": "120"},
    )
    assert run.returncode == 0, run.stderr[-3000:]
    assert [(tmp_path / f"rank-{number}").read_text() for number in (0, 1)] == ["2", "2"]
    assert run.stdout.count("step 1 of 1") == run.stdout.count("Everything lies in") == 1
    assert [row.step for row in Report.load(tmp_path / "out" / "report.json").rows] == ["as it came", "train + distill"]
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("bert", "out"))
    assert set(before) == set(after) and not torch.equal(before["classifier.weight"], after["classifier.weight"])
    AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")


# ---------------------------------------------------------------- FSDP

SHARDED = {
    "sequence": ("BertLayer", ["kl", "task", "hidden_mse", "attention_kl", "relations"]),
    "causal-lm": ("LlamaDecoderLayer", ["jensen_shannon", "task", {"hidden_cosine": {"layers": "even"}}]),
    "answers": ("BertLayer", ["kl", "task"]),
}

FSDP_SCRIPT = """
import sys, torch
from pathlib import Path
from accelerate import PartialState
from accelerate.utils import DistributedType
from torch.distributed.tensor import DTensor
from transformers import Trainer
from hfcompress import CompressionCallback, CompressionError, Distill
from tests.distillation.lessons import Rows, pupil
from tests.run.test_processes import SHARDED
from tests.run.test_train import arguments
folder = Path(sys.argv[1])
def trainer(lesson, method, **more):
    fsdp = {"version": 2, "auto_wrap_policy": "TRANSFORMER_BASED_WRAP", "transformer_layer_cls_to_wrap": SHARDED[lesson][0]}
    work = arguments(folder / lesson, 4, learning_rate=1.0, fsdp=True, fsdp_config=fsdp, logging_steps=1, **more)
    # accelerate keeps FSDP for accelerators and would quietly take DistributedDataParallel for CPUs
    PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    return Trainer(model=pupil(lesson), args=work, train_dataset=Rows(lesson), callbacks=[CompressionCallback(method)])
found = {}
for lesson, (_, terms) in SHARDED.items():
    teacher = pupil(lesson, seed=1)
    made = trainer(lesson, Distill(teacher, terms=terms), save_strategy="steps", save_steps=1)
    made.train()
    assert made.args.world_size == 2 and made.accelerator.distributed_type == DistributedType.FSDP
    assert all(isinstance(p, DTensor) for p in made.model.parameters()), "the student is in pieces"
    assert not any(isinstance(p, DTensor) for p in teacher.parameters()), "the teacher is whole"
    made.save_model(folder / lesson / "end")
    found[lesson] = made.state.log_history[0]
try:
    trainer("sequence", Distill("current")).train()
except CompressionError as error:
    found["current"] = str(error)
if made.args.process_index == 0:
    torch.save(found, folder / "found.pt")
"""


def test_under_fsdp_a_step_is_that_of_one_process(tmp_path: Path) -> None:
    """The student in pieces on two CPU processes, through the Trainer and FSDP2; the teacher whole on each."""
    script = tmp_path / "two.py"
    script.write_text(FSDP_SCRIPT)
    run = fresh.two_processes(script, tmp_path, env=env(str(ROOT)))
    assert run.returncode == 0, run.stderr[-3000:]
    found = torch.load(tmp_path / "found.pt")
    for lesson, (_, terms) in SHARDED.items():
        start, model = pupil(lesson).state_dict(), pupil(lesson)
        work = arguments(tmp_path / "one", 8, learning_rate=1.0, logging_steps=1)
        method = Distill(pupil(lesson, seed=1), terms=terms)
        alone = Trainer(
            model=model,
            args=work,
            train_dataset=Rows(lesson),
            callbacks=[CompressionCallback(method)],
        )
        alone.train()
        model.save_pretrained(tmp_path / "one" / lesson)
        expected = load_file(tmp_path / "one" / lesson / "model.safetensors")
        for folder in ("end", "checkpoint-1"):
            saved = load_file(tmp_path / lesson / folder / "model.safetensors")
            assert set(saved) == set(expected)
            for key, value in expected.items():
                torch.testing.assert_close(saved[key], value, atol=1e-4, rtol=0, msg=f"{lesson} {folder} {key}")
        assert max((expected[key] - start[key]).abs().max() for key in expected) > 1e-2, "the step is felt"
        logged = {key: value for key, value in alone.state.log_history[0].items() if key.startswith("distill/")}
        assert len(logged) == len(terms)
        assert {key: found[lesson][key] for key in logged} == pytest.approx(logged, rel=1e-2), (
            "means over batches, then over processes"
        )
    assert found["current"] == "distill: FSDP holds the student in pieces, and 'current' would copy them; give 'original'."


@pytest.mark.parametrize("way", ["launcher", "arguments"])
def test_what_fsdp_can_not_do_is_refused(way: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given: dict[str, Any] = {}
    if way == "launcher":
        monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    else:
        given = {"fsdp": "full_shard"}
    with pytest.raises(CompressionError) as error:
        Train(max_steps=1, bf16=False, **given).run(pupil("sequence"), None)
    assert str(error.value) == (
        "train: FSDP would leave the model in pieces, and the steps of a recipe need it whole; "
        "use DistributedDataParallel, or distil under FSDP in a script of your own."
    )
    monkeypatch.delenv("ACCELERATE_USE_FSDP", raising=False)
    trainer = Trainer(model=pupil("sequence"), args=arguments(tmp_path), train_dataset=Rows("sequence"))
    if way == "launcher":
        monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    else:
        trainer.args.fsdp = True  # a Trainer built with it wants several processes
    callback = CompressionCallback(PruneNeurons(0.5))
    with pytest.raises(CompressionError) as error:
        callback.on_init_end(trainer.args, trainer.state, trainer.control, model=trainer.model)
    assert str(error.value) == (
        "prune_neurons: FSDP leaves every process a piece of each weight, and only distill may ride along; "
        "use DistributedDataParallel, or a step of its own before or after this training."
    )


def test_a_teacher_without_weights_is_refused(tmp_path: Path) -> None:
    """As every process but the first has it, if weights are loaded in one of them only."""
    with torch.device("meta"):
        empty = nn.Linear(2, 2)
    teacher = pupil("sequence", seed=1)
    teacher.classifier = empty
    trainer = Trainer(
        model=pupil("sequence"),
        args=arguments(tmp_path),
        train_dataset=Rows("sequence"),
        callbacks=[CompressionCallback(Distill(teacher))],
    )
    with pytest.raises(CompressionError) as error:
        trainer.train()
    assert str(error.value) == (
        "distill: only the first process holds the teacher's weights; set fsdp_cpu_ram_efficient_loading to false "
        "(accelerate's config) or cpu_ram_efficient_loading (fsdp_config)."
    )
