"""Write docs/REFERENCE.md: python scripts/reference.py"""

from __future__ import annotations

from pathlib import Path

from hfcompress.run.explain import reference

if __name__ == "__main__":
    (Path(__file__).parents[1] / "docs" / "REFERENCE.md").write_text(reference(), encoding="utf-8")
