"""The order in which units can go when what is left makes up for each of them: Optimal Brain Surgeon on one layer."""

from __future__ import annotations

import torch
from torch import Tensor

PANEL = 32
"""Units that go before the matrices are brought up to date: until then their changes wait as factors of low rank."""


def prices(projections: list[tuple[Tensor, Tensor]], size: int, damping: float) -> Tensor:
    """(count,): the share of what the projections say that is lost when a unit and all that are cheaper have gone, 0 to 1.

    `projections`: those that read the units, each as its weight (out, count * size) and the second moments of what it reads,
    S (count * size, count * size). With G = (S + ridge)^-1, setting the columns J of a unit to zero and the others to what
    makes up for it best costs

        min mean |W x - W' x|^2 + ridge |W - W'|^2 = tr W_J (G_JJ)^-1 W_J^T     at W' = W - W_J (G_JJ)^-1 G_J:

    The cheapest unit goes, and the others are priced anew, as G less what J explains of it is the inverse of S without J: of
    two units that say the same, the first is cheap and the second is not. Hassibi, Stork 1993, Optimal Brain Surgeon; by layers
    and least squares Frantar, Alistarh 2022 (arXiv 2208.11580); of whole units Kurtic et al. 2023, ZipLM (arXiv 2302.04089).
    """
    count = projections[0][0].shape[1] // size
    if not all(bool(square.isfinite().all()) for _, square in projections):
        return torch.full((count,), torch.nan)
    sides = [_Side(weight, square, size, damping) for weight, square in projections]
    found = torch.zeros(count, dtype=torch.float64)
    left, gone, paid = torch.arange(count), torch.zeros(count, dtype=torch.bool), 0.0
    for step in range(count):
        costs = torch.stack([side.costs().cpu() for side in sides]).sum(0).clamp_min(0)
        unit = int(costs.masked_fill(gone, torch.inf).argmin())
        paid += float(costs[unit])
        found[left[unit]], gone[unit] = paid, True
        for side in sides:
            side.remove(unit, step % PANEL)
        if step % PANEL == PANEL - 1:
            for side in sides:
                side.keep(~gone)
            left, gone = left[~gone], gone[~gone]
    return found / max(paid, 1e-30)


class _Side:
    """One projection: G and B = W^T W of the columns that are left, each as it was before the panel, and the panel.

    Without J, and with U = G_:J (G_JJ)^-1, G becomes G - U G_J: and B becomes B - V U^T - U V^T, V = B_:J - U B_JJ / 2.
    """

    def __init__(self, weight: Tensor, square: Tensor, size: int, damping: float) -> None:
        self.size = size
        square, weight = square.double(), weight.to(square.device).double()
        ridge = (damping * square.diagonal().mean()).clamp_min(1e-30)
        eye = torch.eye(len(square), dtype=square.dtype, device=square.device)
        factor, failed = torch.linalg.cholesky_ex(square + ridge * eye)
        while int(failed):  # no ridge was asked for, and columns say the same
            ridge = 10 * ridge
            factor, failed = torch.linalg.cholesky_ex(square + ridge * eye)
        self.g = torch.cholesky_inverse(factor)
        self.b = weight.T @ weight
        self._begin()

    def _begin(self) -> None:
        self.u, self.k, self.v = (self.g.new_zeros(len(self.g), PANEL * self.size) for _ in range(3))
        self.g_own, self.b_own = (self._blocks(matrix) for matrix in (self.g, self.b))

    def _blocks(self, matrix: Tensor) -> Tensor:
        """(count, size, size): each unit's own."""
        blocks = matrix.unflatten(0, (-1, self.size)).unflatten(2, (-1, self.size))
        return blocks.diagonal(dim1=0, dim2=2).movedim(-1, 0).clone()

    def costs(self) -> Tensor:
        """(count,)"""
        if self.size == 1:
            return (self.b_own / self.g_own).flatten()
        return torch.linalg.solve(self.g_own, self.b_own).diagonal(dim1=-2, dim2=-1).sum(-1)

    def remove(self, unit: int, place: int) -> None:
        at = slice(unit * self.size, (unit + 1) * self.size)
        k = self.g[:, at] - self.u @ self.k[at].T
        b = self.b[:, at] - self.v @ self.u[at].T - self.u @ self.v[at].T
        u = torch.linalg.solve(k[at], k, left=False)
        v = b - u @ b[at] / 2
        panel = slice(place * self.size, (place + 1) * self.size)
        self.u[:, panel], self.k[:, panel], self.v[:, panel] = u, k, v
        u, k, v = (part.unflatten(0, (-1, self.size)) for part in (u, k, v))
        self.g_own -= u @ k.mT
        self.b_own -= v @ u.mT + u @ v.mT
        self.g_own[unit], self.b_own[unit] = torch.eye(self.size).to(self.g), 0.0

    def keep(self, units: Tensor) -> None:
        """The panel is full: bring everything up to date, without the units that have gone."""
        live = units.repeat_interleave(self.size).to(self.g.device)
        u, k, v = (part[live] for part in (self.u, self.k, self.v))
        self.g = self.g[live][:, live] - u @ k.T
        self.b = self.b[live][:, live] - v @ u.T - u @ v.T
        self._begin()
