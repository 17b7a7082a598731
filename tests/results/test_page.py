"""The page of a report: complete in itself, everything in it, nothing of this machine, readable on phones and on paper."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from hfcompress import LowRank, PruneNeurons, Quantize
from hfcompress.checkpoint.errors import CompressionError
from hfcompress.results.card import write_card
from hfcompress.results.layer_plot import Cell, cells, widths
from hfcompress.results.markup import element
from hfcompress.results.page import page_for, write_page
from hfcompress.results.page_figures import Scale, scale_of
from hfcompress.results.page_layers import colour_of, ink_on
from hfcompress.results.page_style import DARK, LIGHT
from hfcompress.results.report import Report, Row
from hfcompress.results.saved_files import saved_files
from hfcompress.run.train import thinned
from tests.tiny import tiny_model

DOCS = Path(__file__).parents[2] / "docs"
RECIPE = "model: me/small\ntask:\n  name: text-classification\n  dataset: /home/somebody/secret/texts\nsteps:\n- quantize\n"
CURVE = [(10 * n, 3.0 / n) for n in range(1, 41)]
CHROMES = (os.environ.get("CHROME", ""), "chromium", "chromium-browser", "google-chrome")
CHROME = next((found for name in CHROMES if name and (found := shutil.which(name))), None)


class Page(HTMLParser):
    """What a page holds: its elements with their attributes and texts. Fails where tags are not balanced."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.found: list[tuple[str, dict[str, Any], list[str]]] = []
        self.within: list[int] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        assert len(dict(attrs)) == len(attrs), "an attribute twice"
        self.found.append((tag, dict(attrs), []))
        if tag not in ("meta", "br"):
            self.open.append(tag)
            self.within.append(len(self.found) - 1)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag
        self.within.pop()

    def handle_data(self, data: str) -> None:
        for index in self.within:
            self.found[index][2].append(data)

    def all(self, tag: str, **attributes: str) -> list[str]:
        """The texts of these elements."""
        return [
            "".join(told)
            for name, given, told in self.found
            if name == tag and all(value in (given.get(key.rstrip("_")) or "").split() for key, value in attributes.items())
        ]


def row(step: str, mb: float, score: float | None, ms: float | None = None, **other: Any) -> Row:
    times: Any = {} if ms is None else {"b1": {"min": ms, "median": ms}, "b8": {"min": 8 * ms, "median": 8 * ms}}
    fields: dict[str, Any] = {"parameters": 1000, "latency_ms": times, "score": {"accuracy": score}, "headline": "accuracy"}
    return Row(step=step, megabytes=mb, **(fields | other))


def story(**other: Any) -> Report:
    gains = {"accuracy": {"better": -0.01, "interval": [-0.03, 0.01], "examples": 100}}
    then = row("", 1, 0.9, 10.0).latency_ms
    return Report(
        row("as it came", 90.0, 0.97, 10.0),
        row("train", 90.0, 0.97, 10.0, reference_ms=then, curve=CURVE),
        row("quantize 8", 24.0, 0.96, 5.0, reference_ms=then, gains=gains, times_faster={"b1": [1.9, 2.1], "b8": [1.9, 2.1]}),
        on={"cpu": "some", "versions": {"torch": "2.0"}},
        goal={"max_drop": 0.02, "smaller": 8.0},
        same_dtype=row("… in bfloat16", 45.0, 0.968, 6.0, reference_ms=then, settings={"dtype": "bfloat16"}),
        **other,
    )


def written(folder: Path, report: Report, recipe: str = RECIPE, base: str = "me/small", **layers: Any) -> str:
    folder.mkdir(exist_ok=True)
    write_page(folder, base_model=base, report=report, recipe_text=recipe, **layers)
    text = (folder / "report.html").read_text(encoding="utf-8")
    assert len(text.encode()) < 1e6
    return text


def stack(layers: int, places: int) -> list[Cell]:
    names = [f"model.layers.*.part{number}.proj" for number in range(places)]
    return [Cell(index, name, 4.5, 100, "codes") for index in range(layers) for name in names]


# What is in it


@pytest.mark.parametrize("name", ["quickstart", "llm-prune", "story"])
def test_it_is_whole_and_loads_nothing(name: str, tmp_path: Path) -> None:
    report = story() if name == "story" else Report.load(DOCS / f"{name}.json")
    text = written(tmp_path, report, cells=stack(3, 2))
    page = Page(text)
    tags = [tag for tag, _, _ in page.found]
    assert not {"script", "link", "img", "iframe", "object", "use", "image"} & {*tags} and tags.count("h1") == 1
    assert "url(" not in text and "@import" not in text and "javascript" not in text.lower()
    addresses = [given[key] for _, given, _ in page.found for key in ("src", "href", "srcset") if key in given]
    assert addresses == ["https://huggingface.co/me/small"]
    assert not any(key.startswith("on") for _, given, _ in page.found for key in given)
    assert page.all("title")[0] == f"{tmp_path.name[:80]}: report of hfcompress" and 'lang="en"' in text
    headings = [int(tag[1]) for tag in tags if re.fullmatch("h[1-6]", tag)]
    assert headings[0] == 1 and all(after <= before + 1 for before, after in pairwise(headings))
    for tag, given, _ in page.found:
        if tag == "svg":
            assert given.get("aria-hidden") == "true" or (given["role"] == "img" and given["aria-label"])


@pytest.mark.parametrize("name", ["quickstart", "llm-prune", "story"])
def test_every_row_point_and_layer_is_there(name: str, tmp_path: Path) -> None:
    report = story() if name == "story" else Report.load(DOCS / f"{name}.json")
    page = Page(written(tmp_path, report, cells=stack(3, 2)))
    assert page.all("p", class_="verdict") == [report.verdict()]
    names, lines = report.cells()
    assert page.all("th", scope="col") == names
    assert page.all("th", scope="row") + page.all("td") == [line[0] for line in lines] + [c for line in lines for c in line[1:]]
    points = [title for title in page.all("title") if " MB" in title or " ms" in title]
    off = 1 if name == "quickstart" else 0  # an untrained head
    assert len(points) == 2 * (len(report.rows) + len(report.baselines) - off)
    assert page.all("text", class_="number")[: len(report.rows) - off] == [str(n + 1) for n in range(off, len(report.rows))]
    assert len(
        page.all("g", class_="cell")
    ) == 6 and "layer 2, model.layers.*.part1.proj: 4.5 bits a weight, codes" in page.all("title")
    goal = page.all("li", class_="met") + page.all("li", class_="missed")
    assert len(goal) == len(report.judge(report.goal)) and all(one.startswith(("met: ", "missed: ")) for one in goal)
    assert page.all("pre")[0] == "model: me/small\ntask:\n  name: text-classification\n  dataset: texts\nsteps:\n- quantize"


def test_a_point_is_told_apart_by_its_shape(tmp_path: Path) -> None:
    page = Page(written(tmp_path, story()))
    shapes = {given["class"]: tag for tag, given, _ in page.found if "mark " in (given.get("class") or "")}
    assert shapes == {"mark reference": "polygon", "mark step": "circle", "mark last": "polygon", "mark same": "polygon"}
    corners = [
        given["points"].count(",") for _, given, _ in page.found if given.get("class") in ("mark reference", "mark last")
    ]
    assert {3, 4} == {*corners}
    assert len(page.all("path", class_="spread")) == 2, "the interval of the last row, in both figures"


def test_the_short_form_is_for_a_pull_request(tmp_path: Path) -> None:
    written(tmp_path, story())
    text = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert text.startswith(
        f"# {tmp_path.name}\n\n{story().verdict()}\n\n- met: accuracy may drop by 0.02, it dropped by 0.0100.\n"
    )
    assert "\n- missed: smaller: 8 times wanted, 3.75 times reached.\n" in text and story().markdown().strip() in text
    assert text.endswith("\n- quantize\n```\n\n</details>\n")
    assert text.count("<details>") == 1 and "somebody" not in text


# What anybody may have written


EVIL = '<script>alert("x")</script> & <img src=x onerror=y> \u202e\x07'


def test_every_text_is_escaped(tmp_path: Path) -> None:
    report = story()
    report.rows = [replace(one, step=EVIL, notes=(EVIL,)) for one in report.rows]
    report.machine = {EVIL: EVIL, "list": [EVIL], "versions": {EVIL: EVIL}}
    recipe = f"model: me/small\nsteps:\n- {json.dumps(EVIL)}\n"
    text = written(tmp_path, report, recipe, base=EVIL, cells=[Cell(0, EVIL, 4.0, 10, "codes")])
    page = Page(text)
    assert not {"script", "img"} & {tag for tag, _, _ in page.found}
    assert '<script>alert("x")</script>' in "".join(page.all("body")) and "\u202e" not in text and "\x07" not in text
    assert "<script" not in (tmp_path / "report.md").read_text(encoding="utf-8").partition("<details>")[0]
    assert str(element("p", "a < b", title='"')) == '<p title="&quot;">a &lt; b</p>'


def test_no_path_of_this_machine_is_in_it(tmp_path: Path) -> None:
    report = story()
    report.rows[1] = replace(
        report.rows[1], step="prune /home/somebody/secret/texts", notes=("read /home/somebody/secret/texts",)
    )
    recipe = RECIPE.replace("me/small", "/home/somebody/models/bert")
    folder = tmp_path / "small.partial" / "artifact"
    folder.mkdir(parents=True)
    text = written(folder, report, recipe, base="/home/somebody/models/bert") + (folder / "report.md").read_text()
    assert "somebody" not in text and str(tmp_path) not in text and "prune texts" in text and "Made of bert" in text
    assert text.count("<h1>small</h1>") == 1, "the name that the folder will have"


def odd() -> dict[str, Report]:
    first, last = row("as it came", 90.0, 31.6, 10.0), row("cut", 45.0, 1.2e5, 5.0)
    long = "a name of three hundred characters " * 9
    return {
        "no score": Report(row("a", 9.0, None, 1.0), row("b", 3.0, math.nan, 1.0), on={}, goal={"max_drop": 0.1}),
        "nan first": Report(row("a", 9.0, math.inf, 1.0), row("b", 3.0, 0.5, 1.0), on={}),
        "no latency": Report(row("a", 9.0, 0.9), row("b", 3.0, 0.8), on={}, goal={"faster": 2.0}),
        "one row": Report(row("as it came", 9.0, 0.9, 1.0), on={}, goal={"smaller": 2.0}),
        "perplexity": Report(first, replace(last, higher_is_better=False), on={}),
        "alike": Report(row("a", 9.0, 0.5, 1.0), row("b", 9.0, 0.5, 1.0), on={}),
        "nothing": Report(row("a", 9.0, 0.0, 1.0), row("b", 9.0, 0.0, 1.0), on={}),
        "negative": Report(row("a", 9.0, -0.5, 1.0), row("b", 9.0, 1e-9, 1.0), on={}),
        "many": Report(*(row(f"step {n}", 90.0 - n, 0.9 + n / 1e3, 10.0) for n in range(40)), on={}),
        "long": Report(*(row(long.replace(" ", gap), 9.0, 0.5, 1.0) for gap in (" ", "_", "/")), on={"cpu": long}),
        "flat curve": Report(
            row("a", 9.0, 0.5, 1.0, curve=[(0, 0.0), (0, 0.0)]), row("b", 9.0, 0.5, 1.0, curve=[(5, 1.0)]), on={}
        ),
    }


@pytest.mark.parametrize("name", odd())
def test_odd_figures_are_drawn_as_far_as_they_are_known(name: str, tmp_path: Path) -> None:
    text = written(tmp_path, odd()[name], cells=[Cell(None, "head", 32.0, 5)])
    page = Page(text)
    assert page.all("p", class_="verdict")[0] and "Step by step" in page.all("h2")
    assert not re.search(r"\b(nan|inf|None)\b", text.partition("<main>")[2])
    numbers = [given[key] for _, given, _ in page.found for key in ("cx", "cy", "x", "y") if key in given]
    assert all(-100 < float(number) < 3000 for number in numbers)


def test_a_scale_has_round_ticks_within_it() -> None:
    for low, high in ((0.82, 0.97), (31.0, 1.2e5), (0.5, 0.5), (0.0, 0.0), (-3.0, 1e-9), (1e-7, 2e-7), (1e8, 3e8)):
        scale = scale_of([low, high], 300.0, 10.0)
        ticks = scale.ticks()
        assert 2 <= len(ticks) <= 9 and all(scale.low <= one <= scale.high for one in ticks)
        assert 10 < scale(high) <= scale(low) < 300 and len({scale.named(one) for one in ticks}) == len(ticks)
    assert Scale(0.0, 8.0, 0.0, 80.0)(4.0) == 40.0


# Layers


def test_what_was_cut_factored_and_coded_is_drawn(tmp_path: Path) -> None:
    model = tiny_model("llama")
    before = widths(model)
    PruneNeurons(0.5, scores="magnitude").run(model, None)
    LowRank(rank=8, target_modules=["o_proj"]).run(model, None)
    Quantize(4, engine="hfcompress", target_modules=["up_proj", "gate_proj", "down_proj"]).run(model, None)
    found = {(cell.index, cell.place): cell for cell in cells(model)}
    assert found[0, "model.layers.*.self_attn.o_proj"].kind == "factors"
    assert found[1, "model.layers.*.mlp.up_proj"].kind == "codes"
    titles = Page(written(tmp_path, story(), cells=cells(model), before=before)).all("title")
    told = {title.partition(":")[0]: title for title in titles if title.startswith("layer ")}
    assert len(told) == len(before) and all("100 %" in told[name] for name in told if "q_proj" in name)
    assert told["layer 0, model.layers.*.mlp.up_proj"].endswith("50 % of its weights left, codes")
    assert told["layer 1, model.layers.*.self_attn.o_proj"].endswith("100 % of its weights left, factors")


def test_where_layers_were_cut_the_rest_is_compared_with_the_same_place(tmp_path: Path) -> None:
    before = {(cell.index, cell.place): 200 for cell in stack(12, 2)}
    page = Page(written(tmp_path, story(), cells=stack(6, 2), before=before))
    assert sum("50 % of its weights left" in title for title in page.all("title")) == 12
    assert "6 of 12 layers are left." in "".join(page.all("p"))


def test_a_deep_model_is_drawn_coarser_and_that_is_said(tmp_path: Path) -> None:
    page = Page(written(tmp_path, story(), cells=stack(200, 70), before={}))
    told = "".join(page.all("p", class_="note"))
    assert "The model has 200 layers: each row is 8 of them" in told and "The first 60 of 70 places are drawn." in told
    assert len(page.all("g", class_="cell")) == 25 * 60


def test_a_page_written_again_without_the_model_keeps_its_layers(tmp_path: Path) -> None:
    first = written(tmp_path, story(), cells=stack(3, 2))
    assert written(tmp_path, story()) == first
    assert "Layer by layer" not in written(tmp_path, story(), cells=[])


def luminance(colour: str) -> float:
    parts = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return sum(weight * part for weight, part in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def contrast(one: str, other: str) -> float:
    high, low = sorted((luminance(one), luminance(other)), reverse=True)
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("scheme", [LIGHT, DARK], ids=["light", "dark"])
def test_text_and_marks_stand_out(scheme: str) -> None:
    colours = dict(re.findall(r"--(\w+): (#\w{6});", scheme))
    for ground in ("paper", "raised", "row"):
        assert all(contrast(colours[text], colours[ground]) >= 4.5 for text in ("ink", "soft", "link"))
    assert all(contrast(colours[mark], colours["paper"]) >= 3 for mark in ("reference", "step", "last", "good", "bad"))
    for bits in (0.5, 1, 1.6, 2, 3, 4.1, 5, 6, 8, 12, 16, 32, 64):
        ink = {"#000": "#000000", "#fff": "#ffffff"}[ink_on(colour_of(bits))]
        assert contrast(f"#{colour_of(bits)}", ink) >= 4.5


# The curve


def test_a_curve_is_kept_and_read_back(tmp_path: Path) -> None:
    story().save(tmp_path / "report.json")
    again = Report.load(tmp_path / "report.json")
    assert again.rows == story().rows and again.rows[1].curve == CURVE and again.rows[0].curve == []
    page = Page(written(tmp_path, again))
    (line,) = [given["points"] for _, given, _ in page.found if given.get("class") == "loss"]
    assert line.count(",") == len(CURVE) and "How the loss fell" in page.all("h2")


@pytest.mark.parametrize(
    "curve",
    ["x", [[1]], [[1, "x"]], [[-1, 0.5]], [[1.5, 0.5]], [[1, None]], [[1, float("inf")]], [[n, 0.5] for n in range(201)]],
)
def test_a_curve_that_is_none_is_refused(curve: Any, tmp_path: Path) -> None:
    told = story().to_dict()
    told["beside"][1]["curve"] = curve
    (tmp_path / "report.json").write_text(json.dumps(told))
    with pytest.raises(CompressionError, match="report, row 2: curve"):
        Report.load(tmp_path / "report.json")


def test_of_many_losses_neighbours_are_averaged() -> None:
    history: list[dict[str, Any]] = [{"step": n, "loss": float(n % 2)} for n in range(1, 1001)]
    found = thinned([*history, {"step": 1000, "loss": math.nan}, {"step": 1000, "train_loss": 0.5}])
    assert len(found) <= 200 and found[-1][0] == 1000 and all(0.3 < loss < 0.7 for _, loss in found)
    assert thinned(history[:3]) == [(1, 1.0), (2, 0.0), (3, 1.0)] and thinned([]) == []


# Beside it


def test_the_card_shows_the_pictures_and_leads_to_the_page(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"architectures": ["BertModel"], "model_type": "bert"}')
    fields: dict[str, Any] = {"base_model": str(tmp_path), "report": story(), "recipe_text": RECIPE, "task": "causal-lm"}
    write_card(tmp_path, **fields)
    assert "report.html" not in (tmp_path / "README.md").read_text()
    text = written(tmp_path, story())
    for name in ("report.png", "layers.png"):
        (tmp_path / name).touch()
    write_card(tmp_path, **fields)
    card = (tmp_path / "README.md").read_text()
    assert "](report.png)" in card and "](layers.png)" in card and "[report.html](report.html)" in card
    assert {"report.html", "report.md"} <= set(saved_files(tmp_path))
    assert f"from_pretrained(&quot;{tmp_path.name}&quot;)" in text
    pushed = page_for(tmp_path / "report.html", "me/there").decode()
    assert "from_pretrained(&quot;me/there&quot;)" in pushed and pushed.count("from_pretrained") == text.count(
        "from_pretrained"
    )
    Page(pushed)


# In a browser

LAUNCH = "import os, sys; os.dup2(int(sys.argv[1]), 3); os.dup2(int(sys.argv[2]), 4); os.execv(sys.argv[3], sys.argv[3:])"
"""Chromium reads commands from 3 and answers on 4."""
MEASURE = """JSON.stringify({
    wide: Math.max(0, document.documentElement.scrollWidth - window.innerWidth),
    hidden: [...document.querySelectorAll("svg, table, pre, dl, .tile")].filter(one => {
        const box = one.getBoundingClientRect(); return box.width < 8 || box.height < 8 }).length,
    cut: [...document.querySelectorAll("svg.figure text, svg.layers text")].filter(one => {
        const box = one.getBoundingClientRect(), whole = one.closest("svg").getBoundingClientRect();
        return box.left < whole.left - 1 || box.right > whole.right + 1 || box.top < whole.top - 1 || box.bottom > whole.bottom + 1
        }).map(one => one.textContent),
    over: [...document.querySelectorAll("main *")].filter(one => !one.closest(".scroll, pre, svg") &&
        one.getBoundingClientRect().right > window.innerWidth + 1).length,
    paper: getComputedStyle(document.body).backgroundColor,
    clipped: matchMedia("print").matches ? [...document.querySelectorAll(".scroll, pre")].filter(one =>
        one.scrollWidth > one.clientWidth + 1).length : 0,
})"""


class Browser:
    """A Chromium that is told what to do through a pipe."""

    def __init__(self, process: subprocess.Popen[bytes], commands: int, answers: int) -> None:
        self.process, self.commands, self.answers = process, commands, os.fdopen(answers, "rb")
        self.told: list[dict[str, Any]] = []
        self.number, self.session = 0, None
        target = self.ask("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.ask("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log"):
            self.ask(f"{domain}.enable")

    def ask(self, method: str, **parameters: Any) -> dict[str, Any]:
        self.number += 1
        message = {"id": self.number, "method": method, "params": parameters}
        message |= {"sessionId": self.session} if self.session else {}
        os.write(self.commands, json.dumps(message).encode() + b"\0")
        while (answer := self.read()).get("id") != self.number:
            self.told.append(answer)
        assert "error" not in answer, answer
        return answer["result"]  # type: ignore[no-any-return]

    def read(self) -> dict[str, Any]:
        told = b""
        while (byte := self.answers.read(1)) not in (b"\0", b""):
            told += byte
        assert told, "the browser is gone"
        return json.loads(told)  # type: ignore[no-any-return]

    def open(self, path: Path, width: int, scheme: str, media: str = "") -> dict[str, Any]:
        self.ask("Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=width < 600)
        feature = {"name": "prefers-color-scheme", "value": scheme}
        self.ask("Emulation.setEmulatedMedia", media=media, features=[feature])
        self.told.clear()
        self.ask("Page.navigate", url=path.as_uri())
        while not any(one.get("method") == "Page.loadEventFired" for one in self.told):
            self.told.append(self.read())
        found = json.loads(self.ask("Runtime.evaluate", expression=MEASURE)["result"]["value"])
        errors = ("Runtime.exceptionThrown", "Runtime.consoleAPICalled", "Log.entryAdded")
        found["errors"] = [one for one in self.told if one.get("method") in errors]
        return found  # type: ignore[no-any-return]


@contextmanager
def browser(folder: Path) -> Iterator[Browser]:
    theirs, commands = os.pipe()
    answers, ours = os.pipe()
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--single-process", "--no-zygote", "--remote-debugging-pipe"]
    command = [sys.executable, "-c", LAUNCH, str(theirs), str(ours), str(CHROME), *options, f"--user-data-dir={folder}"]
    process = subprocess.Popen(command, pass_fds=(theirs, ours), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    os.close(theirs)
    os.close(ours)
    try:
        yield Browser(process, commands, answers)
    finally:
        process.kill()
        process.wait()
        os.close(commands)


@pytest.mark.skipif(CHROME is None, reason="needs a Chromium: CHROME=path, or on PATH")
def test_it_is_readable_on_a_phone_on_a_screen_and_on_paper(tmp_path: Path) -> None:
    reports = {name: Report.load(DOCS / f"{name}.json") for name in ("quickstart", "llm-prune")} | odd() | {"story": story()}
    for name, report in reports.items():
        written(tmp_path / name, report, cells=stack(12, 9), before={(cell.index, cell.place): 200 for cell in stack(12, 9)})
    with browser(tmp_path / "profile") as chromium:
        for name in reports:
            for width, scheme, media in (
                (400, "light", ""),
                (400, "dark", ""),
                (1280, "light", ""),
                (1280, "dark", ""),
                (794, "dark", "print"),
            ):
                found = chromium.open(tmp_path / name / "report.html", width, scheme, media)
                paper = "rgb(18, 23, 29)" if scheme == "dark" and not media else "rgb(255, 255, 255)"
                assert found == {"wide": 0, "hidden": 0, "cut": [], "over": 0, "paper": paper, "clipped": 0, "errors": []}, (
                    name,
                    width,
                    scheme,
                )
