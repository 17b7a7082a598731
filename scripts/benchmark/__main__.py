"""Us beside what people would use instead: docs/BENCHMARKS.md, by `python scripts/benchmark [bbc] [newsgroups] [digits] [language]`.

The same models, data, machine and threads for everybody; each contestant in an environment of its own, made by this script of
pinned packages, and in a process of its own; all are timed in turns, so that whatever else the machine does falls on all alike.
What was made is kept in out/benchmark, and a run that was stopped goes on from there. About an hour and a half a part on two
cores, most of it training. Figures of other kinds of processors stay beside those of this one.
"""

from __future__ import annotations

import argparse
import json
import sys
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # what its neighbours know

import encoder
import language
from data import DATA
from environments import ROOT
from page import draw, excerpt, page, processor

from hfcompress.results.measure import machine

DOCS, EXCERPT = ROOT / "docs", "bbc-vnni"
PARTS = {
    **{name: partial(encoder.measured, name) for name in DATA},
    "language": language.measured,
}


def main() -> None:
    """Measure the parts asked for, keep the figures of the others, and write the page and its pictures from all."""
    parser = argparse.ArgumentParser(
        prog="benchmark", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("parts", nargs="*", choices=[*PARTS, []], help="all if none is named")
    path = DOCS / "benchmarks.json"
    for part in parser.parse_args().parts or PARTS:
        told = {**PARTS[part](), "machine": machine()}
        found = json.loads(path.read_text()) if path.is_file() else {}
        found[f"{part}-{processor(told['machine'])}"] = told
        path.write_text(json.dumps(found, indent=1) + "\n")
        write()


def write() -> None:
    """The page, the pictures and README's table, from the figures."""
    found = json.loads((DOCS / "benchmarks.json").read_text())
    (DOCS / "BENCHMARKS.md").write_text(page(found), encoding="utf-8")
    draw(found, DOCS)
    if EXCERPT in found:
        readme, start, end = ROOT / "README.md", "<!-- benchmark table -->", "<!-- end of it -->"
        before, after = readme.read_text().partition(start)[0], readme.read_text().partition(end)[2]
        readme.write_text(f"{before}{start}\n{excerpt(found[EXCERPT]['rows'])}\n{end}{after}")


if __name__ == "__main__":
    main()
