"""Codes are chosen on a CUDA device as on a processor, by a kernel of its own."""

from __future__ import annotations

from typing import Any

import pytest

from hfcompress.calibration.codes import choose_codes
from hfcompress.calibration.column_sweep import Columns
from hfcompress.calibration.grid import Grid
from tests.calibration.test_codes import GRIDS, correlated, gaussian
from tests.gpu.place import DEVICE


@pytest.mark.parametrize("stage", ["feedback", "rounding"])
@pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS)
def test_the_kernel_chooses_the_same_codes(grid: Grid, stage: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """But for what lies between two values, as sums are rounded otherwise, and for what follows from it: few codes, most of them
    where there are 255 values (0.028 seen), and as small an error."""
    weight, square, swept = gaussian(200), correlated(), 0
    whole = Columns.swept

    def counted(self: Columns, *args: Any) -> Any:
        nonlocal swept
        swept += self._has_kernel
        return whole(self, *args)

    monkeypatch.setattr(Columns, "swept", counted)
    here = choose_codes(weight, grid, stage, square)
    assert not swept
    there = choose_codes(weight.to(DEVICE), grid, stage, square.to(DEVICE))
    assert bool(swept) == (DEVICE.type == "cuda"), "torch brings Triton along where it is built for CUDA"
    assert (there.codes.cpu() != here.codes).float().mean() < 0.05
    assert there.error == pytest.approx(here.error, rel=0.01)
