"""docs/BENCHMARKS.md and its pictures, from the figures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from contestants import REFERENCE
from data import DATA, TOKENS
from demo import sentence
from encoder import BATCHES, ROUNDS
from environments import PACKAGES
from language import COMPARED, TURNS

KINDS = {"amx": "with AMX", "vnni": "with VNNI", "avx2": "with AVX2 alone"}
"""Processors by what they multiply 8-bit integers with, as the figures are kept."""
OURS, THEIRS, FIRST = "#2a9d5c", "#9aa5b1", "#d1495b"


SHOWN = (
    "PyTorch, compiled, bfloat16",
    "OpenVINO (optimum), bfloat16",
    "OpenVINO (optimum, NNCF), int8",
    "half of the layers, OpenVINO (optimum, NNCF), int8",
    "hfcompress quickstart, PyTorch",
    "hfcompress quickstart, OpenVINO",
    "hfcompress quickstart, OpenVINO, int8",
    "hfcompress fastest, OpenVINO, int8",
    "hfcompress fastest, two layers, OpenVINO, int8",
    "hfcompress fastest, one layer, OpenVINO, int8",
)
"""What README shows of BBC News: the best of each kind."""


def excerpt(rows: dict[str, Any]) -> str:
    """README's table."""
    lines = ["| on BBC News | times as fast | MB | accuracy |", "| --- | ---: | ---: | ---: |"]
    first = rows[REFERENCE]
    lines.append(f"| {REFERENCE} | | {first['megabytes']:.1f} | {first['accuracy']:.3f} |")
    for name in SHOWN:
        row = rows[name]
        low, high = row["ms"]["b8"]["faster"]
        change = "{:+.3f} to {:+.3f}".format(*row["difference"])
        label = f"**{name}**" if row["is_ours"] else name
        lines.append(f"| {label} | {low:.1f} to {high:.1f} | {row['megabytes']:.1f} | {row['accuracy']:.3f} ({change}) |")
    return "\n".join(lines)


def processor(machine: dict[str, Any]) -> str:
    """Which of KINDS it is."""
    flags = machine["cpu_flags"]
    return "amx" if "amx_int8" in flags else "vnni" if "avx512_vnni" in flags else "avx2"


def page(found: dict[str, Any]) -> str:
    """The whole page; parts that were not measured are left out."""
    lines = [
        "# Beside what people would use instead",
        "",
        "`python scripts/benchmark` writes this page: everybody gets the same model, texts, machine and threads, an environment of "
        "their own and a process of their own, and all are timed in turns. What is ours begins with hfcompress.",
        "",
    ]
    for name, told in sorted(found.items(), key=lambda one: list(KINDS).index(one[0].partition("-")[2])):
        lines += _language(name, told) if name.startswith("language") else _encoder(name, told)
    lines += ["## Environments", ""]
    lines += [f"- {name}: {', '.join(f'`{package}`' for package in packages)}" for name, packages in PACKAGES.items()]
    lines += ["- hfcompress: this checkout; what it exports runs in `runtimes`, where PyTorch is not installed.", ""]
    return "\n".join(lines)


def _encoder(name: str, told: dict[str, Any]) -> list[str]:
    rows = told["rows"]
    return [
        f"## An encoder: {told['title']}, {KINDS[name.partition('-')[2]]}",
        "",
        f"{sentence(told['machine'])} {f'{TOKENS} tokens' if DATA[name.partition('-')[0]].is_text else 'Pictures of 28 x 28'}, milliseconds: least (median) of {ROUNDS} rounds, and how many times as fast as the first "
        "row, the 95 % interval of the median of neighbouring runs. Accuracy, and the paired 95 % interval of its difference, on "
        f"{told['examples']:,} held-out examples; agrees: the same prediction as the first row's, and as the same model's in PyTorch. MB: the "
        "file of the weights, or what PyTorch "
        "would save. Memory: of the whole process after batches of 32, its libraries too. Minutes: of compressing and exporting, "
        "without the fine-tuning that all start from. Half of the layers is the classic way, by the recipe `distil-half`.",
        "",
        "| model and runtime | MB | batch 1 | batch 8 | batch 32 | accuracy | agrees | memory, MB | minutes |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
        *(_encoder_row(name, row) for name, row in rows.items()),
        "",
        *(f"- {_verdict(rows, size)}" for size in BATCHES),
        "",
        f"![{told['title']}: accuracy against size and against time](benchmarks-{name}.png)",
        "",
    ]


def _encoder_row(name: str, row: dict[str, Any]) -> str:
    times = [
        f"{one['min']:.1f} ({one['median']:.1f})"
        + ("" if name == REFERENCE else f" {one['faster'][0]:.2f} to {one['faster'][1]:.2f}x")
        for one in row["ms"].values()
    ]
    change = "" if name == REFERENCE else " ({:+.3f} to {:+.3f})".format(*row["difference"])
    cells = [
        f"**{name}**" if row["is_ours"] else name,
        f"{row['megabytes']:.1f}",
        *times,
        f"{row['accuracy']:.3f}{change}",
        f"{row['agreement']:.3f}" + ("" if row["as_in_pytorch"] is None else f" / {row['as_in_pytorch']:.3f}"),
        f"{row['resident']:.0f}",
        f"{row['minutes']:.1f}",
    ]
    return f"| {' | '.join(cells)} |"


def holds(row: dict[str, Any]) -> bool:
    """Whether its loss of accuracy could be chance."""
    return bool(row["difference"][1] >= 0)


def fastest(rows: dict[str, Any], size: int, ours: bool) -> str:
    """The name of the fastest without a significant loss, by the lower end of its interval."""
    fit = [name for name, row in rows.items() if row["is_ours"] == ours and holds(row) and name != REFERENCE]
    return max(fit, key=lambda name: rows[name]["ms"][f"b{size}"]["faster"][0])


def _verdict(rows: dict[str, Any], size: int) -> str:
    """The fastest of both sides, beside the reference."""
    told = []
    for side in (True, False):
        name = fastest(rows, size, side)
        low, high = rows[name]["ms"][f"b{size}"]["faster"]
        told.append(f"{name}, {low:.2f} to {high:.2f} times as fast as the first row, in {rows[name]['megabytes']:.1f} MB")
    return f"Batch {size}, no significant loss: {told[0]}; of the others {told[1]}."


def _language(name: str, told: dict[str, Any]) -> list[str]:
    first = next(iter(told["rows"].values()))
    lines = [
        f"## A language model: SmolLM2-135M-Instruct, {KINDS[name.partition('-')[2]]}",
        "",
        f"{sentence(told['machine'])} Tokens a second, best (median) of {TURNS} turns: writing {told['written']} after a few, reading "
        f"{told['prompt']}; of ours also how many times as fast as the whole model in the same runtime and type, the 95 % interval of "
        f"the median of neighbouring turns. Perplexity on {told['windows']} windows of {told['window']} tokens of held-out news and of a novel, each "
        "computed by the runtime itself: llama.cpp is made to write the texts, and tells each token's probability. Same tokens: of "
        f"{COMPARED} that the same model writes in PyTorch in float32, how many come before the first other one. The file that the "
        "model comes from is Q4_1 already: its float32 form lies on that grid, so that Q4_1 and Q8_0 lose less than they would of "
        "others.",
        "",
        "| model and runtime | MB | writing | reading | perplexity, news | novel | same tokens | memory, MB | minutes |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for label, row in told["rows"].items():
        perplexities = [
            f"{row[key]:.2f}" + ("" if row is first else f" ({row[key] / first[key] - 1:+.1%})")
            for key in ("perplexity_news", "perplexity_novel")
        ]
        cells = [
            f"**{label}**" if row["is_ours"] else label,
            f"{row['megabytes']:.1f}",
            *(_speed(row[do], row["is_ours"]) for do in ("write", "read")),
            *perplexities,
            f"{row['same']}",
            f"{row['resident']:.0f}",
            f"{row['minutes']:.1f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return [*lines, "", f"![SmolLM2: perplexity against size and against speed](benchmarks-{name}.png)", ""]


def _speed(told: dict[str, Any], is_ours: bool) -> str:
    faster = " {:.2f} to {:.2f}x".format(*told["faster"]) if is_ours and "faster" in told else ""
    return f"{told['best']:.1f} ({told['median']:.1f}){faster}"


def draw(found: dict[str, Any], folder: Path) -> None:
    """A picture a part: quality against size and against speed."""
    for name, told in found.items():
        if name.startswith("language"):
            size = {label: (row["megabytes"], row["perplexity_news"]) for label, row in told["rows"].items()}
            pace = {label: (row["write"]["best"], row["perplexity_news"]) for label, row in told["rows"].items()}
            axes = ("megabytes", "tokens a second", "perplexity on news, lower is better")
        else:
            size = {label: (row["megabytes"], row["accuracy"]) for label, row in told["rows"].items()}
            pace = {label: (row["ms"]["b8"]["min"], row["accuracy"]) for label, row in told["rows"].items()}
            axes = ("megabytes", "milliseconds at batch 8", "accuracy")
        ours = {label for label, row in told["rows"].items() if row["is_ours"]}
        _picture(folder / f"benchmarks-{name}.png", [size, pace], axes, ours)


def _picture(path: Path, panels: list[dict[str, tuple[float, float]]], labels: tuple[str, str, str], ours: set[str]) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullFormatter

    names = list(panels[0])
    figure = Figure(figsize=(11, 4.4 + 0.17 * ((len(names) + 1) // 2)), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    for axes, points, label in zip(figure.subplots(1, 2, sharey=True), panels, labels[:2], strict=True):
        axes.set_xscale("log")
        axes.set_xlabel(label)
        axes.grid(alpha=0.3)
        for number, name in enumerate(names, 1):
            color = OURS if name in ours else FIRST if number == 1 else THEIRS
            axes.scatter(*points[name], color=color, s=150, zorder=2 + (name in ours))
            axes.annotate(str(number), points[name], ha="center", va="center", fontsize=7, color="white", zorder=4)
    figure.axes[0].set_ylabel(labels[2])
    for axis in figure.axes:
        axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.xaxis.set_major_formatter("{x:g}")
        axis.xaxis.set_minor_formatter(NullFormatter())
    half = (len(names) + 1) // 2
    for column, part in enumerate((names[:half], names[half:])):
        text = "\n".join(f"{names.index(name) + 1}  {name}" for name in part)
        figure.text(0.02 + 0.5 * column, -0.02, text, va="top", fontsize=8)
    figure.savefig(path, format="png", bbox_inches="tight")
