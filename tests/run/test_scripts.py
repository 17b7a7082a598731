"""The scripts people have: one added line distils, evaluation and checkpoints stay what they were, resuming changes nothing."""

from __future__ import annotations

import json
import shutil
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer, SwinConfig, SwinForImageClassification

from hfcompress import (
    Adapters,
    CompressionCallback,
    CompressionError,
    Distill,
    LowRank,
    PruneHeads,
    PruneNeurons,
    attach,
    riding,
)
from hfcompress.methods import Method
from tests.run.scripts import SCRIPTS, Line, checkpoint, glue_no_trainer

STEPS, HALF = 8, 4
TERMS: dict[str, list[Any]] = {
    "glue": ["kl", "task", "hidden_mse", "attention_mse", "relations"],
    "clm": ["jensen_shannon", "task", {"hidden_cosine": {"layers": "even"}}, "attention_kl"],
    "qa": ["kl", "task", {"hidden_mse": {"embeddings": True}}, "attention_mse"],
    "summarization": ["kl", "task", "hidden_mse", {"attention_mse": {"stack": "encoder"}}],
    "images": ["kl", "task", "hidden_mse", "attention_kl"],
    "images-pvt": ["kl", "task", {"hidden_mse": {"layers": "even", "embeddings": True}}],
}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A student and a teacher for each script."""
    folder = tmp_path_factory.mktemp("scripts")
    for name in SCRIPTS:
        checkpoint(name, folder / name / "student", seed=0)
        checkpoint(name, folder / name / "teacher", seed=1)
    return folder


def run(name: str, place: Path, out: Path, line: Line | None = None, **more: Any) -> tuple[Any, dict[str, float]]:
    """A script from its command line: AdamW with a schedule, dropout and shuffling, as they come."""
    fields = {
        "model_name_or_path": place / name / "student",
        "output_dir": out,
        "do_train": True,
        "do_eval": True,
        "max_steps": STEPS,
        "learning_rate": 1e-2,
        "weight_decay": 0.01,
        "lr_scheduler_type": "cosine" if name in ("glue", "summarization") else "linear",
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 2 if name == "clm" else 1,
        "eval_strategy": "steps",
        "eval_steps": HALF,
        "save_strategy": "steps",
        "save_steps": HALF,
        "logging_steps": 2,
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        **({"predict_with_generate": True, "generation_max_length": 6} if name == "summarization" else {}),
        **({"remove_unused_columns": False} if name.startswith("images") else {}),
        **({"max_train_samples": 16} if name == "clm" else {}),  # terms are logged as means over batches: equal ones
        **more,
    }
    argv = [part for key, value in fields.items() for part in (f"--{key}", str(value))]
    return SCRIPTS[name][0](argv, line or Line())


def added(way: str, method: Distill) -> Line:
    if way == "callback":
        return Line(keywords={"callbacks": [CompressionCallback(method)]})
    return Line(after=lambda trainer: attach(trainer, method))


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def told(metrics: dict[str, float]) -> dict[str, float]:
    """What an evaluation found, without when and how fast."""
    return {key: value for key, value in metrics.items() if not key.endswith(("_runtime", "_second", "_time", "epoch", "step"))}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return set(one) == set(other) and all(torch.equal(one[key], other[key]) for key in one)


@cache
def teacher(name: str, place: Path, **more: Any) -> Any:
    return SCRIPTS[name][1].from_pretrained(place / name / "teacher", **more)


@pytest.mark.parametrize("name", SCRIPTS)
def test_one_line_distils_and_leaves_the_rest_alone(name: str, place: Path, tmp_path: Path) -> None:
    run(name, place, tmp_path / "plain")
    plain = weights(tmp_path / "plain")
    for way in ("callback", "attach"):
        out = tmp_path / way
        trainer, metrics = run(name, place, out, added(way, Distill(teacher(name, place))))
        steps = [logs for logs in trainer.state.log_history if "loss" in logs]
        assert len(steps) == STEPS / 2
        for logs in steps:
            assert logs["distill/kl"] > 1e-3
            assert 0.7 * logs["distill/kl"] + 0.3 * logs["distill/task"] == pytest.approx(logs["loss"], rel=1e-3)
        for folder in (out, out / f"checkpoint-{HALF}", out / f"checkpoint-{STEPS}"):
            assert set(weights(folder)) == set(plain)
        assert json.loads((out / "config.json").read_text()) == json.loads((tmp_path / "plain/config.json").read_text())
        loaded, about = SCRIPTS[name][1].from_pretrained(out, output_loading_info=True)
        assert not about["missing_keys"] and not about["unexpected_keys"] and not about["mismatched_keys"]
        assert same(dict(loaded.named_parameters()), dict(trainer.model.named_parameters()))

        evaluated = [logs for logs in trainer.state.log_history if any(key.startswith("eval_") for key in logs)]
        during = evaluated[0]
        assert during["step"] == HALF and len(evaluated) == 3
        for folder, seen in ((out / f"checkpoint-{HALF}", during), (out, metrics)):
            # the script without the line, which only evaluates what was saved
            plainly = told(run(name, place, tmp_path / "eval", model_name_or_path=folder, do_train=False)[1])
            assert len(plainly) > 1 and told(seen) == pytest.approx(plainly, rel=1e-5)
    assert not any(torch.equal(weights(tmp_path / "attach")[key], plain[key]) for key in plain if plain[key].dim() > 1)
    assert same(weights(tmp_path / "attach"), weights(tmp_path / "callback"))


@pytest.mark.parametrize("name", SCRIPTS)
def test_resuming_half_way_gives_the_weights_of_a_whole_run(name: str, place: Path, tmp_path: Path) -> None:
    eager = {"attn_implementation": "eager"}

    def line() -> Line:
        given = "original" if name == "glue" else teacher(name, place, **eager)
        return added("callback", Distill(given, terms=TERMS[name]))

    run(name, place, tmp_path / "whole", line(), **eager)
    half = tmp_path / "whole" / f"checkpoint-{HALF}"
    begun = shutil.copytree(half, tmp_path / "again" / half.name)
    trainer, _ = run(name, place, tmp_path / "again", line(), resume_from_checkpoint=begun, **eager)
    whole, again = weights(tmp_path / "whole"), weights(tmp_path / "again")
    assert not same(whole, weights(half)), "the second half moved it"
    assert trainer.state.global_step == STEPS
    for key, value in whole.items():
        torch.testing.assert_close(again[key], value, atol=0, rtol=0, msg=key)
    logged = [json.loads((tmp_path / out / "trainer_state.json").read_text())["log_history"] for out in ("whole", "again")]
    steps = [[logs for logs in history if "loss" in logs] for history in logged]
    assert steps[0] == steps[1] and len(steps[0]) == STEPS / 2
    assert TERMS[name] and all(
        f"distill/{next(iter(term)) if isinstance(term, dict) else term}" in steps[0][-1] for term in TERMS[name]
    )


def test_without_the_callback_a_vit_does_not_resume(place: Path, tmp_path: Path) -> None:
    """transformers saves ViT under its old names, and its Trainer reads them back under the new ones: transformers issue 48805."""
    run("images", place, tmp_path / "whole")
    run("images", place, tmp_path / "again", resume_from_checkpoint=tmp_path / "whole" / f"checkpoint-{HALF}")
    assert not same(weights(tmp_path / "whole"), weights(tmp_path / "again")), "mended upstream: _read_back can go"


@pytest.mark.parametrize(
    "methods",
    [(LowRank(rank=4), Distill()), (Adapters(r=2, merge=False),), (PruneHeads(0.5), PruneNeurons(0.5), Distill())],
    ids=lambda methods: "+".join(one.key() for one in methods),
)
def test_a_loop_without_a_trainer_trains_what_is_put_in(methods: tuple[Method, ...], place: Path, tmp_path: Path) -> None:
    start = place / "glue" / "student"
    if any(method.adds_parameters for method in methods):
        with pytest.raises(
            CompressionError, match=r"the optimizer was built before `riding` put new parameters into the model"
        ):
            glue_no_trainer(start, tmp_path / "never", lambda model, loader, _: riding(model, methods, loader))
        assert not (tmp_path / "never").exists()
    before: dict[str, torch.Tensor] = {}

    @contextmanager
    def watched(model: Any, loader: Any, optimizer: Any) -> Any:
        with riding(model, methods, loader, optimizer=optimizer) as tick:
            before.update({name: one.detach().clone() for name, one in model.named_parameters() if one.requires_grad})
            yield tick
            unmoved = [name for name, one in model.named_parameters() if name in before and torch.equal(one, before[name])]
            assert before and not unmoved

    model = glue_no_trainer(start, tmp_path / "out", watched)
    words = {"input_ids": torch.tensor([[2, 7, 9, 11, 3]])}
    again = SCRIPTS["glue"][1].from_pretrained(tmp_path / "out", num_labels=3).eval()
    torch.testing.assert_close(again(**words).logits, model.eval()(**words).logits, atol=1e-6, rtol=1e-6)
    loaded = dict(again.named_parameters())
    assert all(torch.equal(loaded[name], one) for name, one in model.named_parameters() if ".original_module." not in name)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_checkpoint_of_half_precision_stays_one_and_loads(dtype: torch.dtype, place: Path, tmp_path: Path) -> None:
    SCRIPTS["glue"][1].from_pretrained(place / "glue" / "student").to(dtype).save_pretrained(tmp_path / "half")
    AutoTokenizer.from_pretrained(place / "glue" / "student").save_pretrained(tmp_path / "half")
    methods = (LowRank(rank=4, target_modules=["query", "key"]), PruneNeurons(0.5), Distill())
    line = Line(keywords={"callbacks": [CompressionCallback(*methods)]})
    trainer, _ = run("glue", place, tmp_path / "out", line, model_name_or_path=tmp_path / "half", eval_strategy="no")
    assert {one.dtype for one in trainer.model.parameters()} == {dtype}
    again = SCRIPTS["glue"][1].from_pretrained(tmp_path / "out").eval()
    words = {"input_ids": torch.tensor([[2, 7, 9, 11, 3]])}
    assert torch.equal(again(**words).logits, trainer.model.eval()(**words).logits) and again.dtype == dtype


def test_attention_within_windows_is_refused() -> None:
    """Swin on 4 by 4 patches: its first layer attends within 4 windows, which is no map an example."""
    sizes = {"embed_dim": 16, "depths": [1, 1], "num_heads": [2, 4], "window_size": 2, "image_size": 16, "patch_size": 4}
    student, other = (SwinForImageClassification(SwinConfig(**sizes, attn_implementation="eager")) for _ in range(2))
    given = {"pixel_values": torch.randn(3, 3, 16, 16), "labels": torch.tensor([0, 1, 1])}
    method = Distill(other, terms=[{"attention_kl": {"layers": "even"}}])
    with riding(student.train(), [method]), pytest.raises(CompressionError) as error:
        student(**given)
    assert str(error.value) == (
        "distill: attention_kl: 12 attention maps for 3 examples: this model attends within windows; "
        "take terms on hidden states, such as hidden_mse."
    )
