"""Scores in a file: taken once, ranked for several targets."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, NoReturn

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from hfcompress.calibration.processes import processes
from hfcompress.checkpoint.errors import CompressionError
from hfcompress.checkpoint.writing import written
from hfcompress.surgery.units.spans import Units

FORMAT = "1"
SUFFIX = ".safetensors"


def check_place(path: str, where: str) -> None:
    """Before anything is scored: whether a file can be written there."""
    folder, why = Path(path).parent, "it is a folder" if Path(path).is_dir() else ""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        why = str(error.strerror)
    if why or not os.access(folder, os.W_OK):
        why = why or "the folder is read-only"
        raise CompressionError(f"{where}: save_scores: {path} can't be written ({why}); give a file in a folder that can.")


def save_scores(path: str, model: Any, all_units: list[Units], scores: list[Tensor], **about: Any) -> None:
    """One tensor for each of the units, by the name of their output projection; what they are stands in the metadata."""
    if not processes().is_main_process:
        return
    told = {"format": FORMAT, "model_type": model.config.model_type, "kind": all_units[0].kind, **about}
    tensors = {units.output: values.contiguous() for units, values in zip(all_units, scores, strict=True)}
    with written(path, "the scores"):
        save_file(tensors, path, metadata={key: str(value) for key, value in told.items()})


def saved_scores(path: str, model: Any, all_units: list[Units]) -> list[Tensor]:
    """The scores that `save_scores` wrote of these very units; CompressionError where they are another model's."""

    def refuse(what: str) -> NoReturn:
        raise CompressionError(
            f"scores: {path} {what}; possible is a file that save_scores wrote for this model and these units; score it anew "
            f"with save_scores, or name a score."
        )

    if not Path(path).is_file():
        refuse("is no file")
    try:
        with safe_open(path, framework="pt") as file:
            told = file.metadata() or {}
            found = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        refuse(f"can't be read ({str(error).strip().rstrip('.')})")
    if told.get("format") != FORMAT:
        refuse("holds no scores of hfcompress")
    kind = all_units[0].kind
    if told["kind"] != kind:
        refuse(f"holds scores of {told['kind']}, and {kind} are to be cut")
    if told["model_type"] != model.config.model_type:
        refuse(f"holds scores of a {told['model_type']!r}, and the model is a {model.config.model_type!r}")
    for units in all_units:
        shape = tuple(found[units.output].shape) if units.output in found else None
        if shape != units.shape:
            refuse(f"has {'none' if shape is None else shape} for {units.output}, which has {units.shape} {kind}")
    if len(found) != len(all_units):
        refuse(f"is of {len(found)} layers, and the model has {len(all_units)}")
    scores = [found[units.output].float() for units in all_units]
    if not all(bool(torch.isfinite(values).all()) for values in scores):
        refuse("holds numbers that are not finite")
    return scores
