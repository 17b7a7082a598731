"""The model card: what a folder on the Hub says of itself, every figure taken from the report."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable
from numbers import Real
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, HfApi, ModelCard, ModelCardData
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from huggingface_hub.utils import validate_repo_id

from hfcompress.checkpoint.writing import written
from hfcompress.results.load_snippet import SNIPPET_END, SNIPPET_START, fenced, load_section
from hfcompress.results.public_text import cut_paths, each_text, paths_in, without_paths

TIMEOUT = 10  # seconds to wait for what a card can do without
PICTURES = {
    "report.png": "Score against size on disk and against latency, step by step",
    "layers.png": "The bits stored for each weight, layer by layer",
}
# Where a task of ours and the Hub's pipeline differ in name; None where the Hub has several, and the task can't tell which.
PIPELINES = {"causal-lm": "text-generation", "masked-lm": "fill-mask", "seq2seq-lm": None}


def card_for(path: Path, repo_id: str) -> bytes:
    """The card as the Hub shall show it: title, name and snippet say `repo_id`. Any other card stays as it is."""
    if SNIPPET_START not in path.read_text(encoding="utf-8"):
        return path.read_bytes()
    card, name = ModelCard.load(path), repo_id.split("/")[1]
    if card.data.eval_results:
        card.data.model_name = name
    section = load_section(path.parent, repo_id)
    text = re.sub(rf"{SNIPPET_START}.*?{SNIPPET_END}", lambda _: section, card.text, count=1, flags=re.S)
    card.text = re.sub(r"^# .*$", f"# {name}", text, count=1, flags=re.M)
    return str(card).encode()


def recipe_for_others(path: Path) -> bytes:
    """A recipe.yaml as strangers may read it: of paths on this machine only the last part, as they can't use the rest."""
    return without_paths(path.read_text(encoding="utf-8")).encode()


def report_for_others(path: Path) -> bytes:
    """A report.json without the paths that its folder's recipe names."""
    recipe = path.with_name("recipe.yaml")
    paths = paths_in(recipe.read_text(encoding="utf-8")) if recipe.is_file() else set()
    data = json.loads(path.read_text(encoding="utf-8"))
    return (json.dumps(each_text(data, lambda text: cut_paths(text, paths)), indent=2, ensure_ascii=False) + "\n").encode()


def write_card(
    folder: str | Path,
    *,
    base_model: str,
    report: Any,
    recipe_text: str,
    task: Any,
    tags: Iterable[str] = (),
    license: str | None = None,
    goal: dict[str, float | None] | None = None,
) -> None:
    """Write README.md, the model card, into the folder of a saved model (config.json must be there).

    It names no path of this machine but the folder's, and that only as it was given, if it was relative.

    `report`: rows (step, score, megabytes, parameters), reference, markdown(), to_dict(). `task`: its name, an object
    or a dict with name and dataset. `tags`: of the methods applied. Without `license`
    the base model's card is asked; what can't be known is left out.
    """
    folder = Path(folder)
    name, loaded_as = names_of(folder)
    paths = paths_in(recipe_text)
    data = _metadata(name, base_model, task, license, list(dict.fromkeys(tags)), report.rows[-1].score or {})
    body = [
        f"# {name}",
        _summary(base_model, report),
        load_section(folder, loaded_as),
        "## What was done",
        "\n".join(f"{number}. {cut_paths(row.step, paths)}" for number, row in enumerate(report.rows[1:], start=1))
        or "Nothing yet.",
        "## Measured",
        report.to_dict().get("verdict") or "",
        cut_paths(report.markdown().strip(), paths),
        _machine(report.to_dict().get("machine")),
        *_pictures(folder),
        *_goal(report, goal or {}),
        "## Recipe",
        "Run it again with `hfcompress run recipe.yaml`.",
        fenced("yaml", without_paths(recipe_text).strip()),
    ]
    text = "\n\n".join(part for part in body if part)
    with written(folder / "README.md", "the model card"):
        ModelCard(f"---\n{data.to_yaml()}\n---\n\n{text}\n").save(folder / "README.md")


def names_of(folder: Path) -> tuple[str, str]:
    """What a saved model is called, and how code names its place: absolute ones mean something on this machine only."""
    # A model is written inside NAME.partial and moved when it is whole; the card names the place it will have.
    place = re.sub(r"\.partial(/.*)?$", "", folder.as_posix())
    name = place.rstrip("/").split("/")[-1]
    return name, name if Path(place).is_absolute() else place


def _pictures(folder: Path) -> Iterable[str]:
    """What was drawn of the report and of the layers, and the page that shows both."""
    for file, told in PICTURES.items():
        if (folder / file).is_file():
            yield f"![{told}]({file})"
    if (folder / "report.html").is_file():
        yield "All of it on one page, to be opened in a browser: [report.html](report.html)."


def _metadata(
    name: str, base_model: str, task: Any, license: str | None, tags: list[str], score: dict[str, Any]
) -> ModelCardData:
    hub_base = base_model if is_hub_id(base_model) else None
    named = task if isinstance(task, str) else _field(task, "name")
    pipeline = PIPELINES.get(named or "", named)
    dataset, config = _dataset(_field(task, "dataset"))
    shown = shown_address(_field(task, "dataset")) or "evaluation data"
    fields: dict[str, Any] = {"license": license} if license else _license_of(base_model)
    if hub_base:
        fields |= {"base_model": hub_base, "base_model_relation": "quantized" if "quantization" in tags else "finetune"}
    results = [
        EvalResult(
            task_type=pipeline or "other",
            dataset_type=dataset or shown,
            dataset_name=shown,
            dataset_config=config,
            metric_type=metric,
            metric_value=float(value),
        )
        for metric, value in score.items()
        # The Hub refuses a card with NaN in it, and with the card the whole push.
        if isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)
    ]
    return ModelCardData(
        library_name="transformers",
        tags=["hfcompress", "compression", *tags],
        pipeline_tag=pipeline,
        datasets=[dataset] if dataset else None,
        model_name=name if results else None,
        eval_results=results or None,
        **fields,
    )


def _goal(report: Any, goal: dict[str, float | None]) -> list[str]:
    """What was to be reached, and whether each part was."""
    if not goal:
        return []
    missed = {part: " ".join(report.check_goal({part: wanted})) for part, wanted in goal.items()}
    lines = [f"- {part} {wanted:g}: {f'missed. {missed[part]}' if missed[part] else 'met.'}" for part, wanted in goal.items()]
    return ["## Goal", "\n".join(lines)]


def _summary(base_model: str, report: Any) -> str:
    before, after = report.rows[report.reference], report.rows[-1]
    base = f"[{base_model}](https://huggingface.co/{base_model})" if is_hub_id(base_model) else f"`{shown_address(base_model)}`"
    return (
        f"{base}, compressed with `hfcompress`: {_number(after.parameters / 1e6)} M parameters, were "
        f"{_number(before.parameters / 1e6)} M; {_number(after.megabytes)} MB, were {_number(before.megabytes)} MB."
    )


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.4g}"


def _machine(machine: Any) -> str:
    if isinstance(machine, dict):
        told = {key: " ".join(map(str, value)) if isinstance(value, list) else value for key, value in machine.items()}
        machine = ", ".join(f"{key.replace('_', ' ')} {value}" for key, value in told.items())
    return f"Measured on: {machine}." if machine else ""


def _field(task: Any, name: str) -> str | None:
    value = task.get(name) if isinstance(task, dict) else getattr(task, name, None)
    return value if isinstance(value, str) and value else None


def is_hub_id(name: str) -> bool:
    """Whether it names a repository of the Hub, and nothing that lies here."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return not Path(name).exists()


def shown_address(address: str | None) -> str:
    """How a card names a model or data set: as it is, but of a path on this machine only its last part."""
    if not address or "://" in address or is_hub_id(address):
        return (address or "").split("://")[-1]
    return Path(address).name


def _license_of(base_model: str) -> dict[str, Any]:
    """The licence fields of the base model's card, if it has one and it can be read."""
    try:
        path = Path(base_model) / "README.md"
        if path.is_file():
            data: Any = ModelCard.load(path).data
        elif is_hub_id(base_model):
            data = HfApi().model_info(base_model, timeout=TIMEOUT).card_data
        else:
            return {}
    except Exception:  # no Hub, no such model, a card with a mistake: the licence is not known
        return {}
    fields = {key: getattr(data, key, None) for key in ("license", "license_name", "license_link")}
    return {key: value for key, value in fields.items() if value}


def _dataset(address: str | None) -> tuple[str | None, str | None]:
    """The Hub's id and the configuration; only the Hub can tell `glue/sst2` (both) from `stanfordnlp/sst2` (an id)."""
    if not address or "://" in address or not is_hub_id(address):
        return None, None
    owner, _, config = address.partition("/")
    for name, rest in [(address, None), (owner, config)]:
        try:
            return HfApi().dataset_info(name, timeout=TIMEOUT).id, rest or None
        except HfHubHTTPError:
            continue
        except Exception:  # no Hub: left out rather than guessed
            break
    return None, None
