"""The measured tables of docs/: `make bench`.

Runs the quickstart and the language-model recipes on SmolLM2-135M (packages of the demo extras, no Hub), and writes each
report as JSON and Markdown, with a picture, into docs/. Takes about an hour on two cores.

    python scripts/bench.py [quickstart] [deep-compression] [llm-nf4] [llm-4bit] [llm-low-rank] [llm-prune]
"""

from __future__ import annotations

import sys
from pathlib import Path

from demo import NEWS, SMOL, sentence

from hfcompress import Recipe, compress
from hfcompress.results.plot import plot
from hfcompress.results.report import Report

ROOT = Path(__file__).resolve().parent.parent
MODEL = f"model={SMOL}"
TEXTS = [f"task.dataset={NEWS}", "task.max_eval_samples=16"]
NOTE = "SmolLM2-135M-Instruct comes from a Q4_1 file: its weights lie on a 4-bit grid of 32 before anything is done.\n\n"
RUNS: dict[str, tuple[list[str], str]] = {
    "quickstart": ([], ""),
    "deep-compression": ([], ""),
    **{name: ([MODEL, *TEXTS], NOTE) for name in ("llm-nf4", "llm-4bit", "llm-low-rank", "llm-prune")},
}


def main(names: list[str]) -> None:
    for name in names or list(RUNS):
        overrides, note = RUNS[name]
        out = ROOT / "out" / f"bench-{name}"
        report = compress(Recipe.load(name, overrides), out, overwrite=True, tell=print)
        write(name, report, overrides, note + on_disk(out))


def on_disk(folder: Path) -> str:
    """What somebody downloads to use it: weights, config and tokenizer."""
    sizes = {
        what: sum(file.stat().st_size for pattern in patterns for file in folder.glob(pattern)) / 1e6
        for what, patterns in {
            "weights": ("*.safetensors",),
            "config": ("*config.json",),
            "tokenizer": ("tokenizer.json",),
        }.items()
    }
    told = ", ".join(f"{what} {size:.2f}" for what, size in sizes.items())
    return f"The folder takes {sum(sizes.values()):.2f} MB: {told}.\n\n"


def write(name: str, report: Report, overrides: list[str], note: str) -> None:
    """docs/NAME.json, .png and .md, and the table in README."""
    docs = ROOT / "docs"
    docs.mkdir(exist_ok=True)
    report.save(docs / f"{name}.json")
    plot(report, docs / f"{name}.png")
    command = " ".join(["hfcompress run", name, *(f'"{override}"' for override in overrides)])
    minutes = sum(row.seconds or 0 for row in report.rows) / 60
    head = f"# {name}\n\n`{command}`\n\n{note}The steps took {minutes:.1f} minutes. {sentence(report.machine)}\n\n"
    (docs / f"{name}.md").write_text(head + report.markdown() + "\n", encoding="utf-8")
    if name == "quickstart":
        start, end = "<!-- quickstart table -->", "<!-- end -->"
        readme = (ROOT / "README.md").read_text(encoding="utf-8")
        before, after = readme.partition(start)[0], readme.partition(end)[2]
        table = report.markdown().partition("\n\n")[0]
        (ROOT / "README.md").write_text(f"{before}{start}\n{table}\n{end}{after}", encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
