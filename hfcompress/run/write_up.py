"""What a folder says of itself when a recipe has run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from hfcompress.checkpoint.writing import write_text
from hfcompress.results.card import write_card
from hfcompress.results.layer_plot import Cell, Place
from hfcompress.results.page import write_page
from hfcompress.results.report import Report
from hfcompress.run.recipe import Recipe


def write_up(
    recipe: Recipe,
    report: Report,
    folder: Path,
    cells: Sequence[Cell] | None = None,
    before: Mapping[Place, int] | None = None,
) -> None:
    """Report, page and card; the recipe last, so that it is not taken for done before it is. `cells` and `before`: see
    `write_page`."""
    text = recipe.to_yaml()
    report.save(folder / "report.json")
    write_page(folder, base_model=recipe.model, report=report, recipe_text=text, cells=cells, before=before)
    write_card(
        folder,
        base_model=recipe.model,
        report=report,
        recipe_text=text,
        task=recipe.task,
        tags=[method.tag for method in recipe.methods if method.tag],
        goal=recipe.goal_parts,
    )
    write_text(folder / "recipe.yaml", text, "the recipe")
