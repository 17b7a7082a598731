"""The model card: what a folder on the Hub says of itself, every figure taken from the report."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable
from numbers import Real
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, HfApi, ModelCard, ModelCardData
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from huggingface_hub.utils import validate_repo_id

from hfcompress.checkpoint.errors import CompressionError
from hfcompress.checkpoint.writing import written
from hfcompress.results.load_snippet import SNIPPET_END, SNIPPET_START, fenced, load_section

ABSOLUTE = re.compile(r"/|~|file:|\\\\|[A-Za-z]:[/\\]")
"""How a path begins that means something on one machine only."""
TIMEOUT = 10  # seconds to wait for what a card can do without
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
    return _without_paths(path.read_text(encoding="utf-8")).encode()


def report_for_others(path: Path) -> bytes:
    """A report.json without the paths that its folder's recipe names."""
    recipe = path.with_name("recipe.yaml")
    paths = _paths(recipe.read_text(encoding="utf-8")) if recipe.is_file() else set()
    data = json.loads(path.read_text(encoding="utf-8"))
    return (json.dumps(_each(data, lambda text: _cut(text, paths)), indent=2, ensure_ascii=False) + "\n").encode()


def _without_paths(recipe_text: str) -> str:
    paths = _paths(recipe_text)
    if not paths:
        return recipe_text
    plain = _each(yaml.safe_load(recipe_text), lambda text: _last_part(text) if text in paths else text)
    return yaml.safe_dump(plain, sort_keys=False, allow_unicode=True)


def _paths(recipe_text: str) -> set[str]:
    """The absolute paths among a recipe's values. CompressionError for what is no YAML."""
    found: set[str] = set()
    try:
        _each(yaml.safe_load(recipe_text), lambda text: found.add(text) if ABSOLUTE.match(text) else None)
    except yaml.YAMLError as error:
        raise CompressionError("recipe.yaml: it is not valid YAML; mend it, or take it out of the folder.") from error
    return found


def _cut(text: str, paths: set[str]) -> str:
    for path in sorted(paths, key=len, reverse=True):
        text = text.replace(path, _last_part(path))
    return text


def _last_part(path: str) -> str:
    return re.split(r"[/\\]", path.rstrip("/\\"))[-1]


def _each(value: Any, change: Callable[[str], Any]) -> Any:
    """The same plain data with every string changed."""
    if isinstance(value, dict):
        return {key: _each(part, change) for key, part in value.items()}
    if isinstance(value, list):
        return [_each(part, change) for part in value]
    return change(value) if isinstance(value, str) else value


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
    # A model is written inside NAME.partial and moved when it is whole; the card names the place it will have.
    place = re.sub(r"\.partial(/.*)?$", "", folder.as_posix())
    name = place.rstrip("/").split("/")[-1]
    paths = _paths(recipe_text)
    data = _metadata(name, base_model, task, license, list(dict.fromkeys(tags)), report.rows[-1].score or {})
    body = [
        f"# {name}",
        _summary(base_model, report),
        load_section(folder, name if Path(place).is_absolute() else place),
        "## What was done",
        "\n".join(f"{number}. {_cut(row.step, paths)}" for number, row in enumerate(report.rows[1:], start=1))
        or "Nothing yet.",
        "## Measured",
        report.to_dict().get("verdict") or "",
        _cut(report.markdown().strip(), paths),
        _machine(report.to_dict().get("machine")),
        *_goal(report, goal or {}),
        "## Recipe",
        "Run it again with `hfcompress run recipe.yaml`.",
        fenced("yaml", _without_paths(recipe_text).strip()),
    ]
    text = "\n\n".join(part for part in body if part)
    with written(folder / "README.md", "the model card"):
        ModelCard(f"---\n{data.to_yaml()}\n---\n\n{text}\n").save(folder / "README.md")


def _metadata(
    name: str, base_model: str, task: Any, license: str | None, tags: list[str], score: dict[str, Any]
) -> ModelCardData:
    hub_base = base_model if _is_hub_id(base_model) else None
    named = task if isinstance(task, str) else _field(task, "name")
    pipeline = PIPELINES.get(named or "", named)
    dataset, config = _dataset(_field(task, "dataset"))
    shown = _shown(_field(task, "dataset")) or "evaluation data"
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
    base = f"[{base_model}](https://huggingface.co/{base_model})" if _is_hub_id(base_model) else f"`{_shown(base_model)}`"
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


def _is_hub_id(name: str) -> bool:
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return not Path(name).exists()


def _shown(address: str | None) -> str:
    """How a card names a model or data set: as it is, but of a path on this machine only its last part."""
    if not address or "://" in address or _is_hub_id(address):
        return (address or "").split("://")[-1]
    return Path(address).name


def _license_of(base_model: str) -> dict[str, Any]:
    """The licence fields of the base model's card, if it has one and it can be read."""
    try:
        path = Path(base_model) / "README.md"
        if path.is_file():
            data: Any = ModelCard.load(path).data
        elif _is_hub_id(base_model):
            data = HfApi().model_info(base_model, timeout=TIMEOUT).card_data
        else:
            return {}
    except Exception:  # no Hub, no such model, a card with a mistake: the licence is not known
        return {}
    fields = {key: getattr(data, key, None) for key in ("license", "license_name", "license_link")}
    return {key: value for key, value in fields.items() if value}


def _dataset(address: str | None) -> tuple[str | None, str | None]:
    """The Hub's id and the configuration; only the Hub can tell `glue/sst2` (both) from `stanfordnlp/sst2` (an id)."""
    if not address or "://" in address or not _is_hub_id(address):
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
