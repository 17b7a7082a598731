"""The arguments and options that several commands share, and what they stand for."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from hfcompress.checkpoint.errors import CompressionError

RecipeName = Annotated[str, typer.Argument(help="A shipped recipe (hfcompress list) or a YAML file.")]
Overrides = Annotated[
    list[str] | None, typer.Argument(help="key=value by path: model=me/my-bert steps.1.train.epochs=2", show_default=False)
]
Folder = Annotated[str, typer.Argument(help="A folder made by hfcompress, or any model folder or Hub id.")]
TrustOption = Annotated[
    bool,
    typer.Option("--trust-metrics", help="Allow metrics that are not built in: their code comes from the Hub and runs here."),
]
TaskOption = Annotated[
    str | None,
    typer.Option("--task", help="The task as YAML: '{name: text-classification, dataset: glue/sst2}'; its recipe's if absent."),
]
FastOption = Annotated[
    bool, typer.Option("--fast", help="Switch low-bit layers to what is fastest here, at the price of memory, once weighed.")
]


def trusting(task: Any, trusted: bool) -> Any:
    """The task, and whether it may run metrics that are not built in: who types the command says so, no file."""
    if trusted:
        task.trust_metrics()
    task.check_metrics()
    return task


def model_folder(folder: str) -> Path:
    path = Path(folder)
    if not any((path / name).is_file() for name in ("config.json", "exported.json")):
        raise CompressionError(
            f"{folder!r}: no model lies there (no config.json); give a folder that hfcompress run has written."
        )
    return path


def task_of(*folders_and_task: str | None) -> Any:
    """The task that was given, else the one in the recipe of the first folder that has one."""
    from hfcompress.run.recipe import Recipe, task_from
    from hfcompress.run.safe_yaml import read_yaml

    first, given, *others = folders_and_task
    if given is not None:
        return task_from(read_yaml(given, "--task"))
    for folder in (first, *others):
        told = Path(str(folder)) / "recipe.yaml"
        if told.is_file():
            return Recipe.load(str(told)).task
    raise CompressionError(
        f"{first}: no recipe.yaml lies there to take the task from; "
        f"say it: --task '{{name: text-classification, dataset: ...}}'."
    )
