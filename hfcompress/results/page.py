"""The report as a page that is complete in itself, and as a short text for a pull request.

The page loads nothing and runs nothing: it is safe wherever it is opened.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from copy import copy
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hfcompress.checkpoint.errors import INSTALL
from hfcompress.checkpoint.writing import write_text
from hfcompress.results.card import is_hub_id, names_of, shown_address
from hfcompress.results.layer_plot import Cell, Place
from hfcompress.results.load_snippet import SNIPPET_END, SNIPPET_START, fenced, load_code
from hfcompress.results.markup import Markup, element, joined
from hfcompress.results.measure import Row, finite
from hfcompress.results.page_figures import baseline_look, curve, known, look, scatter, swatch
from hfcompress.results.page_layers import layer_picture
from hfcompress.results.page_style import STYLE
from hfcompress.results.plot import is_off
from hfcompress.results.public_text import cut_paths, paths_in, without_paths
from hfcompress.results.ratios import called, difference, half_interval, speed
from hfcompress.results.sentences import dtype_ratios, judged, significance
from hfcompress.results.table import UNKNOWN, as_number, as_times, columns, score_form, shortened

if TYPE_CHECKING:
    from hfcompress.results.report import Report

PAGE, SHORT = "report.html", "report.md"
LONG = 130  # characters of a verdict that is shown less large
LAYERS_START, LAYERS_END = "<!-- hfcompress: layers -->", "<!-- hfcompress: end of layers -->"


def write_page(
    folder: str | Path,
    *,
    base_model: str,
    report: Report,
    recipe_text: str,
    cells: Sequence[Cell] | None = None,
    before: Mapping[Place, int] | None = None,
) -> None:
    """Write report.html and report.md into the folder of a saved model.

    Neither names a path of this machine. `cells`: the model's layers; without them the picture of a page that lies there stays.
    `before`: how many weights the original's layers had.
    """
    folder = Path(folder)
    name, loaded_as = names_of(folder)
    told = _for_others(report, paths_in(recipe_text))
    recipe = without_paths(recipe_text).strip()
    parts = [
        _head(name, base_model, told),
        _table(told),
        _frontier(told),
        _layers(folder / PAGE, cells, before),
        _curves(told.rows),
        _section(
            "Recipe", element("p", "Run it again with ", element("code", "hfcompress run recipe.yaml"), "."), _code(recipe)
        ),
        _machine(told.machine),
        load_part(folder, loaded_as),
        element("footer", "Written by hfcompress from report.json, which holds every figure."),
    ]
    head = element(
        "head",
        element("meta", charset="utf-8"),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("meta", name="color-scheme", content="light dark"),
        element("title", f"{shortened(name, 80)}: report of hfcompress"),
        element("style", Markup(STYLE)),
    )
    page = element("html", head, element("body", element("main", *parts)), lang="en")
    write_text(folder / PAGE, f"<!DOCTYPE html>\n{page}\n", "the report's page")
    write_text(folder / SHORT, _short(name, told, recipe), "the short report")


def page_for(path: Path, repo_id: str) -> bytes:
    """The page as the Hub shall show it: its snippet loads `repo_id`."""
    text = path.read_text(encoding="utf-8")
    part = load_part(path.parent, repo_id)
    return re.sub(rf"{SNIPPET_START}.*?{SNIPPET_END}", lambda _: part or "", text, count=1, flags=re.S).encode()


def _for_others(report: Report, paths: set[str]) -> Report:
    """A copy without paths of this machine and without scores that are no numbers."""

    def clean(row: Row) -> Row:
        notes = tuple(cut_paths(note, paths) for note in row.notes)
        return replace(row, step=cut_paths(row.step, paths), notes=notes, score=finite(row.score))

    found = copy(report)
    found.rows = [clean(row) for row in report.rows]
    found.same_dtype, found.compiled = (row and clean(row) for row in (report.same_dtype, report.compiled))
    return found


# The head: verdict, goal and large figures


def _head(name: str, base_model: str, report: Report) -> Markup:
    shown, verdict = shown_address(base_model), report.verdict()
    base: object = shown
    if is_hub_id(base_model):
        base = element("a", shown, href=f"https://huggingface.co/{base_model}", rel="noreferrer")
    goal = [
        element("li", _tick(one["met"]), judged(**one), class_="met" if one["met"] else "missed")
        for one in report.judge(report.goal)
    ]
    return element(
        "header",
        element("h1", name),
        element("p", verdict, class_="verdict" if len(verdict) <= LONG else "verdict long"),
        element("p", "Made of ", base, " by hfcompress.", class_="from"),
        element("ul", *goal, class_="goal", aria_label="the goal") if goal else None,
        element("dl", *_tiles(report), class_="tiles"),
    )


def _tick(is_met: bool) -> Markup:
    line = "M3 9l4 4 7-9" if is_met else "M4 4l9 9m0-9l-9 9"
    return element("svg", element("path", d=line), viewBox="0 0 17 17", width=17, height=17, aria_hidden="true")


def _tiles(report: Report) -> Iterator[Markup]:
    first, last = report.rows[report.reference], report.rows[-1]
    is_changed = last is not first
    ratio = first.megabytes / last.megabytes if is_changed and last.megabytes else 1.0
    size = f"was {_megabytes(first)}" if is_changed else ""
    if not 0.995 < ratio < 1.005:
        size = f"{as_times(ratio if ratio > 1 else 1 / ratio)} {'smaller' if ratio > 1 else 'larger'}, {size}"
    yield _tile("Size", _megabytes(last), size)
    if last.latency_ms:
        yield _speed_tile(last, first, next(reversed(last.latency_ms)))
    yield _score_tile(last, first)
    if report.same_dtype is not None and is_changed:
        other = report.same_dtype
        (smaller, *more), by_steps = dtype_ratios(first, last, other)
        told = f"{', '.join(more)}; the steps: {', '.join(by_steps)}" if more else f"the steps: {', '.join(by_steps)}"
        yield _tile(f"From {other.settings.get('dtype', UNKNOWN)} alone", smaller, told)


def _tile(name: str, value: str, more: str) -> Markup:
    told = element("dd", more, class_="more") if more else None
    return element("div", element("dt", name), element("dd", value, class_="value"), told, class_="tile")


def _megabytes(row: Row) -> str:
    return f"{row.megabytes:,.{1 if row.megabytes >= 1 else 3}f} MB"


def _speed_tile(last: Row, first: Row, batch: str) -> Markup:
    name, least = f"Speed at batch {batch[1:]}", f"{last.latency_ms[batch]['min']:.1f} ms"
    found = None if last is first else speed(last, first).get(batch)
    if found is None:
        return _tile(name, least, "" if last is first else "not compared: not timed in turns with the reference")
    then = (last.reference_ms or {}).get(batch)
    told = [f"was {then['min']:.1f} ms"] if then else []
    if found.low is not None and found.high is not None:
        told.append(f"95\u00a0% {as_times(found.low)} to {as_times(found.high)}")
    if found.is_significant is False:
        return _tile(name, least, ", ".join([*told, "no significant difference"]))
    ratio, word = (found.least, "faster") if found.least >= 1 else (1 / found.least, "slower")
    return _tile(name, f"{as_times(ratio)} {word}", ", ".join([least, *told]))


def _score_tile(last: Row, first: Row) -> Markup:
    metric = last.headline
    now, apart = last.score.get(metric), None if last is first else difference(last, first, metric)
    form, told = score_form(now), []
    if apart is not None:
        half = half_interval(last, metric)
        told.append(f"was {as_number(first.score.get(metric), form)}")
        told.append(f"{apart:+{form}}" + ("" if half is None else f" ±{half:{form}} (95\u00a0%)"))
    if metric in last.gains and last is not first:
        told.append(significance(last.gains[metric]["interval"], ("significantly better", "significantly worse")))
    if now is None:
        told.append("not known")
    return _tile(called(metric), as_number(now, form), ", ".join(told))


# The sections


def _section(name: str, *inside: object) -> Markup:
    return element("section", element("h2", name), *inside)


def _code(text: str) -> Markup:
    return element("pre", element("code", text), tabindex=0)


def _table(report: Report) -> Markup:
    found = columns(report)
    lines = list(zip(*(one.cells for one in found), strict=True))
    # The last row's own line: what stands below it are its controls.
    of_last = max(number for number, cells in enumerate(lines) if cells[0] == report.rows[-1].step)
    body = [
        element(
            "tr",
            element("th", cells[0], scope="row"),
            *(element("td", cell) for cell in cells[1:]),
            class_="result" if number == of_last and len(report.rows) > 1 else None,
        )
        for number, cells in enumerate(lines)
    ]
    head = element("tr", *(element("th", one.name, scope="col") for one in found))
    table = element("table", element("thead", head), element("tbody", *body))
    return _section(
        "Step by step",
        element("div", table, class_="scroll", tabindex=0, role="region", aria_label="table of all steps"),
        element("p", report.legend(), class_="note"),
    )


def _frontier(report: Report) -> Markup:
    last = report.rows[-1]
    figures = [element("figure", scatter(report, None))]
    if last.latency_ms:
        figures.append(element("figure", scatter(report, next(reversed(last.latency_ms)))))
    told = []
    for index, row in enumerate(report.rows):
        mark, score = look(report, index), known(row.score.get(last.headline))
        note = " (reference)" if mark == "reference" else " (no score)" if score is None else ""
        note += f" ({score:.3g}, off the scale)" if score is not None and is_off(report, index) else ""
        told.append(element("li", element("b", index + 1), swatch(mark), row.step, element("span", note, class_="note")))
        for other in report.baselines if mark == "reference" else ():
            told.append(
                element(
                    "li", swatch(baseline_look(other, report)), other.step, element("span", " (not compressed)", class_="note")
                )
            )
    how = ["Diamond: the reference. Triangle: the result."]
    if report.baselines:
        how.append("Hollow: what the reference could be without compression.")
    if any(row.gains for row in report.rows):
        how.append("Bars: 95\u00a0% intervals of the difference to the reference.")
    return _section(
        "What the score costs",
        element("div", *figures, class_="pair"),
        element("ol", *told, class_="legend"),
        element("p", " ".join(how), class_="note"),
    )


def _curves(rows: Sequence[Row]) -> Markup | None:
    found = [
        element("figure", element("h3", f"{number} {row.step}"), curve(row))
        for number, row in enumerate(rows, start=1)
        if len(row.curve) > 1
    ]
    return _section("How the loss fell", element("div", *found, class_="pair")) if found else None


def _layers(page: Path, cells: Sequence[Cell] | None, before: Mapping[Place, int] | None) -> Markup | None:
    if cells is None:
        found = re.search(f"{LAYERS_START}.*?{LAYERS_END}", page.read_text(encoding="utf-8"), re.S) if page.is_file() else None
        return Markup(found[0]) if found else None
    if not cells:
        return None
    section = _section("Layer by layer", layer_picture(cells, before))
    return joined(Markup(LAYERS_START), section, Markup(LAYERS_END))


def _machine(machine: Any) -> Markup | None:
    if not machine:
        return None
    told = machine if isinstance(machine, dict) else {"machine": machine}
    pairs = [(element("dt", str(key).replace("_", " ")), element("dd", _plain(value))) for key, value in told.items()]
    return _section("Measured on", element("dl", *(part for pair in pairs for part in pair), class_="machine"))


def _plain(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {part}" for key, part in value.items())
    return ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def load_part(folder: Path, name: str) -> Markup | None:
    """How to load the folder, as `name`; None of what holds no config."""
    if not (folder / "config.json").is_file():
        return None
    code, packages = load_code(folder, name)
    others = [package for package in packages if package != "hfcompress"]
    told = [f"It needs pip install {' '.join(others)}."] if others else []
    told += [f"It needs hfcompress, which {INSTALL.replace('`', '')}."] if "hfcompress" in packages else []
    section = _section("Load it", _code(code), *(element("p", line) for line in told))
    return joined(Markup(SNIPPET_START), section, Markup(SNIPPET_END))


# The short text


def _short(name: str, report: Report, recipe: str) -> str:
    goal = [f"- {judged(**one)}" for one in report.judge(report.goal)]
    told = [f"# {name}", report.verdict(), "\n".join(goal), report.markdown().strip()]
    parts = [part.replace("<", "&lt;") for part in told if part]
    folded = f"<details>\n<summary>Recipe</summary>\n\n{fenced('yaml', recipe)}\n\n</details>"
    return "\n\n".join([*parts, folded]) + "\n"
