"""An artifact taken to where it is served: opened, written in another format, compared with what PyTorch says, put in place."""

from __future__ import annotations

import json
import logging
import re
import shutil
from pathlib import Path
from typing import Any

from transformers import AutoModelForCausalLM

from hfcompress.checkpoint.checksums import check_checksums, read_json, write_checksums
from hfcompress.checkpoint.errors import CompressionError, first_line, printable, shown
from hfcompress.checkpoint.sentence_head import sentence_head_of
from hfcompress.checkpoint.writing import scratch_beside, write_text, written
from hfcompress.export import FORMATS, Format, Source
from hfcompress.export.agreement import agreement
from hfcompress.export.served import TOLD, Served, computed_by, is_export, told_of, weight_bytes
from hfcompress.results.export_card import export_card
from hfcompress.results.measure import weigh
from hfcompress.run.reading import read_named
from hfcompress.run.safe_yaml import read_yaml
from hfcompress.tasks.pretrained import load_tokenizer, open_model

log = logging.getLogger("hfcompress")
ANSWERS = ("labels", "start_positions", "end_positions")
"""What a batch of a task holds beside what a model reads."""


def export_model(
    folder: str | Path,
    to: str | Format = "openvino",
    output: str | Path | None = None,
    task: Any = None,
    overwrite: bool = False,
    **fields: Any,
) -> Path:
    """Export an artifact, or any model folder or Hub id, and return the folder of the export.

    `to`: openvino, onnx, executorch or gguf, whose fields are given by name, or a `Format`. `task`: a `Task`, or the plain
    data of one; the one of the folder's recipe.yaml if absent; gguf needs none. `output`: FOLDER/FORMAT if absent,
    FOLDER/FORMAT-int8 under `quantize`. `overwrite`: an export that lies there is replaced. Raises CompressionError: a runtime
    that is missing, an architecture that the format can't hold, an `output` in use, an export that computes something else
    than PyTorch.
    """
    chosen = to if isinstance(to, Format) else format_of(to, fields)
    chosen.check_here()
    out = place_of(folder, chosen, output)
    check_free(out, overwrite)
    write_export(str(folder), chosen, _task_for(str(folder), chosen, task), out)
    return out


def verify_export(folder: Path) -> bool:
    """Check an export's files against their checksums and, where its runtime is here, that it opens them.

    Returns whether the values were checked: False for a folder without checksums. CompressionError where something is damaged.
    """
    told = told_of(folder)
    checked = check_checksums(folder)
    chosen = format_of(told["to"], {})
    try:
        chosen.check_here()
    except CompressionError:
        return checked
    if chosen.answers:
        try:
            Served(folder)
        except CompressionError:
            raise
        except Exception as error:  # the runtimes' own
            raise CompressionError(
                f"{folder}: {chosen.key()} can't open it ({shown(first_line(error))}); export the model again."
            ) from error
    return checked


def export_lines(folder: Path) -> list[str]:
    """What an export is, for a terminal."""
    told, config = told_of(folder), folder / "config.json"
    found = read_json(config) if config.is_file() else {}
    names = found.get("architectures")
    whose = f"{', '.join(map(str, names)) if isinstance(names, list) else '?'}, {found.get('model_type')}"
    fields = ", ".join(f"{key} {value}" for key, value in dict(told.get("fields") or {}).items())
    agrees = dict(told.get("agreement") or {})
    lines = [
        *([whose] if found else []),
        f"an export to {told['to']}{f' ({fields})' if fields else ''}, which its runtime loads alone",
        f"{told['parameters']:,} parameters in {weight_bytes(folder) / 1e6:.1f} MB",
    ]
    if "off" in agrees:
        lines.append(f"off from what PyTorch says by {agrees['off']:.2g} of the spread of its logits")
    if "same_tokens" in agrees:
        lines.append(f"{agrees['same_tokens']:.0%} of the tokens that it wrote are PyTorch's")
    return [printable(line)[:300] for line in lines]


def format_of(name: str, fields: dict[str, Any]) -> Format:
    """CompressionError with every mistake in the fields."""
    mistakes: list[str] = []
    found = read_named({name: fields}, "export", FORMATS, mistakes)
    if mistakes:
        raise CompressionError("\n".join(mistakes))
    return found  # type: ignore[no-any-return]


def fields_of(given: list[str]) -> dict[str, Any]:
    """`["quantize=int8", "samples=64"]` as plain data."""
    raw: dict[str, Any] = {}
    for one in given:
        if "=" not in one:
            raise CompressionError(f"export: {shown(one)} is no field; write key=value, as in quantize=int8.")
        name, _, value = one.partition("=")
        raw[name] = read_yaml(value, f"export {name}")
    return raw


def place_of(folder: str | Path, chosen: Format, output: str | Path | None) -> Path:
    """Where an export goes: beside the weights, under the format's name; of a model of the Hub, under its own name here."""
    if output is not None:
        return Path(output).expanduser()
    path = Path(folder).expanduser()
    return (path if path.is_dir() else Path(path.name)) / chosen.place


def check_free(out: Path, overwrite: bool) -> None:
    """Only an export of ours is replaced, and only when that was asked for."""
    if out.is_file() or (out.is_dir() and any(out.iterdir()) and not (overwrite and is_export(out))):
        told = "pass --overwrite to replace it, or" if is_export(out) else "which is no export of hfcompress;"
        raise CompressionError(f"export: something lies in {shown(str(out), 200)}; {told} choose another --output.")


def _task_for(folder: str, chosen: Format, task: Any) -> Any:
    from hfcompress.run.arguments import task_of
    from hfcompress.run.recipe import task_from

    if task is not None and not isinstance(task, str):
        return task_from(task) if isinstance(task, dict) else task
    return None if task is None and not chosen.answers else task_of(folder, task)


def write_export(folder: str, chosen: Format, task: Any, out: Path) -> dict[str, Any]:
    """Write it beside its place, compare it with PyTorch, and only then put it there; what is known of it."""
    source = _source(folder, chosen, task)
    count, off = weigh(source.model), {}
    with written(out, "the export"), scratch_beside(out) as scratch:
        work = scratch / out.name
        work.mkdir()
        told = {"to": chosen.key(), "fields": chosen.model_dump(mode="json", exclude_defaults=True)}
        told |= {name: count[name] for name in ("parameters", "nonzero")} | chosen.write(source, work)
        if source.processor is not None:
            source.processor.save_pretrained(work)
        if head := sentence_head_of(source.model):
            head.save_settings(work)
        if (recipe := Path(folder) / "recipe.yaml").is_file():
            shutil.copyfile(recipe, work / recipe.name)
        write_text(work / TOLD, json.dumps(told, indent=2) + "\n", "the export")
        if chosen.answers:
            off = agreement(source, Served(work, in_float32=True), is_exact=getattr(chosen, "quantize", None) is None)
            write_text(work / TOLD, json.dumps({**told, "agreement": off}, indent=2) + "\n", "the export")
        write_checksums(work, computed_by(work))
        write_text(work / "README.md", export_card(work, _called(out), chosen, told | {"agreement": off}), "the model card")
        if out.is_dir():
            shutil.rmtree(out)
        work.rename(out)
    return {**told, "agreement": off}


def _called(out: Path) -> str:
    """How a card names the folder: as it was given, or by its name where that would tell a path of this machine."""
    place = re.sub(r"\.partial/artifact(?=/)", "", out.as_posix())  # it is written there, and moved when it is whole
    return out.name if out.is_absolute() else place


def _source(folder: str, chosen: Format, task: Any) -> Source:
    """The artifact, opened anew: an export is read off what was saved."""
    if task is None:
        model = open_model(folder, AutoModelForCausalLM, device="cpu")
        return Source(model, load_tokenizer(folder), lambda *_: {}, lambda *_: [])
    task = task.model_copy().open(folder)  # whoever lent it goes on with what it has read
    model = open_model(folder, task, device="cpu")

    def samples(count: int) -> Any:
        for batch in task.batches(model, count, batch_size=1):
            yield {name: value for name, value in batch.items() if name not in ANSWERS}

    real = next(samples(1))

    def example(size: int, length: int | None) -> Any:
        batch = task.example(size, length)
        for name in real.keys() - batch.keys():  # segments of pairs, which an example for timing has none of
            batch[name] = real[name].repeat(size, -(-batch["input_ids"].shape[1] // real[name].shape[1]))
            batch[name] = batch[name][:, : batch["input_ids"].shape[1]]
        return batch

    return Source(model, task.processor, example, samples, has_length="input_ids" in real)
