"""The command line: run, list, copy, validate, schema, explain, doctor, show, verify, eval, compare, export, push."""

from __future__ import annotations

import json
import logging
import os
import shutil
import sys
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from hfcompress.checkpoint.errors import CompressionError, printable
from hfcompress.run.arguments import (
    FastOption,
    Folder,
    Overrides,
    RecipeName,
    TaskOption,
    TrustOption,
    model_folder,
    task_of,
    trusting,
)

app = typer.Typer(
    help="Make Hugging Face Transformers smaller and faster.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
console = Console(highlight=False)
LOG_WIDTH = 1000  # columns of a log file or a pipe, where nothing needs to be folded

GOAL_MISSED = 3
"""The exit code of a run whose result is whole and missed its goal."""


def main() -> None:
    """The entry point: a CompressionError is a sentence, not a traceback."""
    try:
        app()
    except (CompressionError, OSError) as error:
        told = "\n".join(printable(line) for line in str(error).splitlines())
        Console(stderr=True, highlight=False, soft_wrap=True).print(f"[red]error[/red] {escape(told)}")
        sys.exit(1)


@app.command()
def run(
    recipe: RecipeName,
    overrides: Overrides = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what lies in output_dir.")] = False,
    control: Annotated[
        bool, typer.Option("--control", help="Also train without the teacher, and the uncompressed model, and compare.")
    ] = False,
    trust_metrics: TrustOption = False,
    push_anyway: Annotated[bool, typer.Option("--push-anyway", help="Push even if the goal was missed.")] = False,
    low_memory: Annotated[
        bool,
        typer.Option("--low-memory", help="Quantise a model that does not fit in memory: a layer at a time, while it is read."),
    ] = False,
) -> None:
    """Run a recipe, and leave a proven artifact. Exit code 3: it is made, and missed its goal."""
    _quiet_transformers()
    from hfcompress.calibration.processes import processes
    from hfcompress.run.loop import compress
    from hfcompress.run.output_folder import output_folder
    from hfcompress.run.recipe import Recipe, find_recipe

    chosen = Recipe.load(recipe, [*(overrides or []), *(["control=true"] if control else [])])
    trusting(chosen.task, trust_metrics)
    out = output_folder(chosen.output_dir if chosen.output_dir is not None else Path("out") / find_recipe(recipe).stem)
    is_main = processes().is_main_process
    tell = _tell if is_main else lambda line: None
    report = compress(chosen, out, overwrite=overwrite, tell=tell, push_anyway=push_anyway, low_memory=low_memory)
    if is_main:
        console.print(report.table())
        _summary(out, report, chosen)
        if report.check_goal(chosen.goal_parts):
            raise typer.Exit(GOAL_MISSED)


def _quiet_transformers() -> None:
    """What transformers says by itself, bars and advice, can only be turned off by calls once it is imported; ours stay."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    asked = os.environ.get("TRANSFORMERS_VERBOSITY", "error").lower()
    transformers_logging.set_verbosity(transformers_logging.log_levels.get(asked, logging.ERROR))


def _tell(line: str) -> None:
    console.print(f"[bold cyan]›[/bold cyan] {escape(line)}")


def _summary(out: Path, report: Any, recipe: Any) -> None:
    console.print(escape(report.verdict()))
    for missed in report.check_goal(recipe.goal_parts):
        console.print(f"[yellow]goal missed[/yellow] {escape(missed)}")
    from hfcompress.results.load_snippet import load_code

    console.print(f"\nEverything lies in [bold]{escape(str(out))}[/bold]: {', '.join(sorted(p.name for p in out.iterdir()))}")
    console.print("Load it with:\n")
    console.print(load_code(out, str(out))[0], markup=False)


@app.command("list")
def list_recipes() -> None:
    """The recipes that ship with hfcompress, and what each buys."""
    from hfcompress.run.recipe import shipped_recipes

    table = Table("recipe", "what it does", "buys", box=None)
    for name, path in shipped_recipes().items():
        head = [
            line.removeprefix("#").strip() for line in path.read_text(encoding="utf-8").splitlines() if line.startswith("#")
        ]
        buys = next((line.partition(":")[2].strip() for line in head if line.startswith("Buys:")), "")
        table.add_row(f"[bold]{name}[/bold]", head[0], buys)
    console.print(table)


@app.command()
def copy(
    recipe: RecipeName,
    file: Annotated[Path, typer.Argument(help="Where to put it.")],
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the file.")] = False,
) -> None:
    """Copy a recipe, to change it."""
    from hfcompress.run.recipe import find_recipe

    source = find_recipe(recipe)
    file = file / source.name if file.is_dir() else file
    if file.exists() and not overwrite:
        raise CompressionError(f"copy: {str(file)!r} exists; choose another name, or pass --overwrite.")
    shutil.copyfile(source, file)
    console.print(f"copied {recipe} to {file}; run it with: hfcompress run {file}", markup=False)


@app.command()
def validate(recipe: RecipeName, overrides: Overrides = None, trust_metrics: TrustOption = False) -> None:
    """Check a recipe whole, and whether this machine can train so, without running anything."""
    from hfcompress.run.recipe import Recipe

    chosen = Recipe.load(recipe, overrides or [])
    trusting(chosen.task, trust_metrics)
    chosen.check_here()
    console.print(f"valid: {len(chosen.steps)} steps: {', '.join(step.key() for step in chosen.steps)}", markup=False)


@app.command()
def schema() -> None:
    """Print the JSON Schema of recipes, for editors."""
    from hfcompress.run.schema import schema as recipe_schema

    sys.stdout.write(json.dumps(recipe_schema(), indent=2) + "\n")


@app.command()
def explain(
    name: Annotated[str | None, typer.Argument(help="A step, task, loss term or score; all of them if absent.")] = None,
) -> None:
    """Say what a method, task, term or score does, and what its fields are."""
    from hfcompress.run.explain import explain as explanation
    from hfcompress.run.explain import overview

    width = min(console.width, 100)
    console.print(overview(width) if name is None else explanation(name, width), markup=False)


@app.command()
def doctor(
    folder: Annotated[Path, typer.Argument(help="Where results are to go.")] = Path("out"),
    as_json: Annotated[bool, typer.Option("--json", help="As JSON, to paste into an issue.")] = False,
) -> None:
    """Look for what is missing, slow or broken on this machine; safe to paste."""
    from hfcompress.run.doctor import examine

    found = examine(folder)
    if as_json:
        sys.stdout.write(json.dumps(found, indent=2) + "\n")
        return
    problems = found.pop("problems")
    for section, lines in found.items():
        console.print(f"[bold]{section}[/bold]")
        for key, value in lines.items():
            console.print(f"  {key}: {value}", markup=False)
    for problem in problems or ["none"]:
        console.print(f"[yellow]problem[/yellow] {escape(problem)}", soft_wrap=True)


@app.command()
def show(folder: Folder) -> None:
    """Print what was changed, layer by layer, and the table."""
    from hfcompress.checkpoint.show import described, harmless
    from hfcompress.export.served import is_export
    from hfcompress.results.report import Report
    from hfcompress.run.exporting import export_lines

    path = model_folder(folder)
    for line in export_lines(path) if is_export(path) else described(path):
        console.print(line if isinstance(line, str) else _changes(line), markup=False)
    if (path / "adapter").is_dir():
        console.print("a LoRA adapter lies in adapter/")
    if (path / "report.json").is_file():
        told = harmless(path / "report.json")
        try:
            console.print(Report.from_dict(told).table())
        except (AttributeError, KeyError, TypeError, ValueError, IndexError) as error:
            raise CompressionError(
                f"{path / 'report.json'}: it is damaged, and holds no table; run the recipe again."
            ) from error


def _changes(rows: list[tuple[str, str]]) -> Table:
    table = Table("module", "what it is now", box=None)
    for row in rows:
        table.add_row(*map(escape, row))
    return table


@app.command()
def verify(folder: Folder) -> None:
    """Check that a folder is the model that was saved: checksums, structure, every tensor."""
    _quiet_transformers()
    from hfcompress.checkpoint.verify import verify as verified
    from hfcompress.export.served import is_export
    from hfcompress.run.exporting import verify_export

    path = model_folder(folder)
    values = verify_export(path) if is_export(path) else verified(path)
    without = "whole, but nothing tells whether its values were changed: it has no checksums.json"
    console.print(f"{folder}: {'whole, as it was saved' if values else without}", markup=False)


@app.command("eval")
def evaluate_model(
    folder: Folder, task: TaskOption = None, trust_metrics: TrustOption = False, fast: FastOption = False
) -> None:
    """Measure any model folder: parameters, megabytes, latency, memory, score."""
    _quiet_transformers()
    from hfcompress.results.report import Report, measure
    from hfcompress.run.record import packed_megabytes
    from hfcompress.tasks.pretrained import open_model

    chosen = trusting(task_of(folder, task), trust_metrics)
    chosen.open(folder)
    report = Report()
    row = measure(open_model(folder, chosen), chosen, folder, faster=fast)
    report.add(replace(row, megabytes=packed_megabytes(Path(folder)) or row.megabytes))
    console.print(report.table())


@app.command()
def compare(
    a: Folder, b: Folder, task: TaskOption = None, trust_metrics: TrustOption = False, fast: FastOption = False
) -> None:
    """Measure two models interleaved, and say where the difference is not significant."""
    _quiet_transformers()
    from hfcompress.results.compare import compare as compare_models
    from hfcompress.run.record import packed_megabytes
    from hfcompress.tasks.pretrained import open_model

    chosen = trusting(task_of(b, task, a), trust_metrics)
    other = chosen.open(a)
    if not chosen.reads_as(b):  # prune_vocab left tokens out
        if chosen.headline == "agreement":
            raise CompressionError(
                f"compare: {b} has another tokenizer than {a}, so answers can't be compared one by one; give --task metrics "
                f"that need labels, or measure each with hfcompress eval."
            )
        other = trusting(task_of(b, task, a), trust_metrics).open(b)
    # one door, so that both lie on the same device
    found = compare_models(open_model(a, chosen), open_model(b, other), chosen, names=(a, b), task_b=other, faster=fast)
    first, second = (packed_megabytes(Path(one)) or size for one, size in zip((a, b), found.megabytes, strict=True))
    console.print(replace(found, megabytes=(first, second)).table())


@app.command("export")
def export_folder(
    folder: Folder,
    fields: Annotated[
        list[str] | None, typer.Argument(help="key=value of the format: quantize=int8, type=Q8_0", show_default=False)
    ] = None,
    to: Annotated[str, typer.Option("--to", help="openvino, onnx, executorch or gguf.")] = "openvino",
    output: Annotated[Path | None, typer.Option("--output", help="Where it goes; FOLDER/FORMAT if absent.")] = None,
    task: TaskOption = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the export that lies there.")] = False,
    trust_metrics: TrustOption = False,
) -> None:
    """Take a model to where it is served; it is compared with PyTorch's answers, and timed beside them."""
    _quiet_transformers()
    from hfcompress.results.compare import compare as compare_models
    from hfcompress.run.exporting import export_model, fields_of, format_of
    from hfcompress.tasks.pretrained import open_model

    chosen = format_of(to, fields_of(fields or []))
    out = export_model(folder, chosen, output, task, overwrite)
    if to != "gguf":
        told = trusting(task_of(folder, task), trust_metrics)
        told.open(folder)
        models = open_model(folder, told, device="cpu"), open_model(out, told)
        console.print(compare_models(*models, told, names=("PyTorch", to)).table())
    console.print(f"exported to {out}; README.md there shows how to load it", markup=False)


@app.command()
def push(
    folder: Annotated[Path, typer.Argument(help="A folder made by hfcompress.")],
    repo_id: Annotated[str, typer.Argument(help="OWNER/NAME")],
    private: Annotated[bool, typer.Option("--private", help="Make a new repository private.")] = False,
) -> None:
    """Push an artifact to the Hub."""
    from hfcompress.results.hub import push as push_folder

    console.print(push_folder(model_folder(str(folder)), repo_id, private=private), markup=False)


@app.callback()
def quiet() -> None:
    """A run's console shows progress, not library noise: told by variables and log levels, without imports."""
    for variable, value in {
        "TOKENIZERS_PARALLELISM": "false",
        "TRANSFORMERS_VERBOSITY": "error",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    }.items():
        os.environ.setdefault(variable, value)
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console.width = LOG_WIDTH
    warnings.filterwarnings("ignore")
    for name in ("bitsandbytes", "accelerate", "peft", "httpx", "httpx2", "torch"):
        logging.getLogger(name).setLevel(logging.ERROR)
    ours = logging.getLogger("hfcompress")
    ours.setLevel(logging.INFO)
    ours.propagate = False
    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(logging.Formatter("  %(message)s"))
    ours.handlers = [handler]


if __name__ == "__main__":
    main()
