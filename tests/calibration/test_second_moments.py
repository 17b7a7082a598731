"""Second moments are kept in panels of the upper triangle: what is read off them is what the tokens say, to rounding."""

from __future__ import annotations

import pytest
import torch

from hfcompress.calibration import second_moments
from hfcompress.calibration.second_moments import Moments


def _tokens(dtype: torch.dtype = torch.float64) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    mixed = torch.randn(13, 13, generator=generator, dtype=torch.float64)
    return (3 + torch.randn(100, 13, generator=generator, dtype=torch.float64) @ mixed).to(dtype)


def _summed(x: torch.Tensor) -> Moments:
    moments = Moments()
    for rows in (x[:0], x[:37], x[37:37], x[37:]):
        moments.add(rows)
    return moments


@pytest.mark.parametrize("panel", [4, 5, 13, 1024])
@pytest.mark.parametrize(("dtype", "precision"), [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 1e-5)])
def test_panels_hold_what_the_tokens_say(
    panel: int, dtype: torch.dtype, precision: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(second_moments, "PANEL", panel)
    x, moments = _tokens(dtype), _summed(_tokens(dtype))
    assert moments.tokens == 100 and len(moments.panels) == -(-13 // panel)
    x = x.double()
    raw, about = x.T @ x / 100, torch.cov(x.T, correction=0)
    torch.testing.assert_close(moments.mean.double(), x.mean(0), atol=precision * 10, rtol=precision)
    for about_mean, expected in ((False, raw), (True, about)):
        near = {"atol": precision * float(expected.abs().max()), "rtol": 0.0}
        torch.testing.assert_close(moments.square(about_mean), expected, **near)
        rows, columns = torch.tensor([12, 0, 7, 5]), torch.tensor([3, 11, 4])
        torch.testing.assert_close(moments.block(rows, columns, about_mean), expected[rows][:, columns], **near)
    weight = torch.randn(6, 13, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    torch.testing.assert_close(moments.mean_square(weight), (x @ weight.T).square().sum() / 100, atol=0.0, rtol=precision * 10)


def test_what_is_read_for_the_last_time_gives_its_memory_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(second_moments, "PANEL", 4)
    moments, every = _summed(_tokens()), torch.arange(13)
    held = sum(panel.numel() for panel in moments.panels)
    assert held < 0.7 * 13 * 13, "of a symmetric matrix half is kept, and the rest of the panels that the diagonal crosses"
    expected = moments.square(True)
    assert torch.equal(moments.block(every, every, True, last=True), expected)
    assert [panel.numel() for panel in moments.panels] == [0, 0, 0, 0]


def test_no_tokens_make_zeros() -> None:
    moments = Moments()
    moments.add(torch.zeros(0, 5))
    assert moments.tokens == 0 and torch.equal(moments.square(True), torch.zeros(5, 5, dtype=torch.float64))
