"""Patterns of sparsity: which weights of a matrix may be zero together, and which of them are, by what each is worth."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

QUANTILES = 4096
"""Points at which the scores of a layer are known, where layers compete."""


@dataclass(frozen=True)
class Pattern:
    """Of weights (out, in): each alone; `group`, N of M neighbours along the inputs; or `block`, so many outputs by inputs."""

    group: tuple[int, int] | None = None
    """(N, M): of every M weights along the inputs, N stay."""
    block: tuple[int, int] | None = None

    @classmethod
    def parse(cls, given: str) -> Pattern:
        """ "2:4", "16x1"; ValueError for what is none."""
        if found := re.fullmatch(r"(\d+):(\d+)", given):
            stay, of = (int(part) for part in found.groups())
            if 0 < stay < of:
                return cls(group=(stay, of))
        if found := re.fullmatch(r"(\d+)x(\d+)", given):
            rows, columns = (int(part) for part in found.groups())
            if rows > 0 and columns > 0:
                return cls(block=(rows, columns))
        raise ValueError(
            f"{given!r} is no pattern; possible are N:M, as 2:4, of every M weights of a row N stay, and blocks of outputs x "
            f"inputs, as 16x1; leave it out for single weights"
        )

    @property
    def sparsity(self) -> float | None:
        """What N:M makes of any matrix."""
        return None if self.group is None else 1 - self.group[0] / self.group[1]

    @property
    def columns(self) -> int | None:
        """How many neighbouring inputs are decided on together; None where any number can be."""
        return self.group[1] if self.group else self.block[1] if self.block else None

    def misfit(self, shape: Sequence[int]) -> str:
        """Why a matrix (out, in) can't have it; empty where it can."""
        out, columns = shape
        if self.group and columns % self.group[1]:
            return f"its {columns} inputs are no multiple of {self.group[1]}"
        if self.block and (out % self.block[0] or columns % self.block[1]):
            return f"its {out} outputs and {columns} inputs are no multiples of {self.block[0]} and {self.block[1]}"
        return ""

    def kept(self, scores: Tensor, sparsity: float, by_row: bool = False) -> Tensor:
        """(out, in), bool: all but this share of the weights, those of the least scores. `by_row`: of every row alike, which
        blocks can't be. N:M zeroes as many of each group as the share allows."""
        if self.group:
            rows = scores.reshape(-1, self.group[1])
            return _but_least(rows, int(round(sparsity * self.group[1], 6))).reshape(scores.shape)
        if self.block:
            (out, columns), (down, across) = scores.shape, self.block
            sums = scores.reshape(out // down, down, columns // across, across).sum((1, 3))
            kept = _but_least(sums.reshape(1, -1), int(sums.numel() * sparsity)).reshape(sums.shape)
            return kept.repeat_interleave(down, 0).repeat_interleave(across, 1)
        rows = scores if by_row else scores.reshape(1, -1)
        return _but_least(rows, int(rows.shape[1] * sparsity)).reshape(scores.shape)


def _but_least(scores: Tensor, gone: int) -> Tensor:
    """(rows, n), bool: all but the `gone` least of each row."""
    kept = torch.ones_like(scores, dtype=torch.bool)
    return kept.scatter_(1, scores.topk(gone, dim=1, largest=False).indices, False) if gone else kept


def quantiles(scores: Tensor) -> Tensor:
    """(`QUANTILES`,), ascending, on the CPU: what stands for a layer's scores where layers compete."""
    ordered = scores.flatten().float().sort().values
    return ordered[torch.linspace(0, len(ordered) - 1, QUANTILES, device=ordered.device).round().long()].cpu()


def shares(curves: Sequence[Tensor], sizes: Sequence[int], sparsity: float, most: float) -> list[float]:
    """The share of each layer's weights that lies under one threshold, `sparsity` of all together, at most `most` of any.

    Curves: `quantiles` of each layer's scores. Where many scores are the same, layers share what is left evenly.
    """
    wanted = sparsity * sum(sizes)

    def below(threshold: float, side: str) -> list[float]:
        found = [int(torch.searchsorted(curve, threshold, right=side == "right")) / len(curve) for curve in curves]
        return [min(share, most) for share in found]

    def held(found: list[float]) -> float:
        return sum(share * size for share, size in zip(found, sizes, strict=True))

    values = torch.cat(list(curves)).unique()
    first, last = 0, len(values) - 1
    while first < last:  # the least value up to which there is enough
        middle = (first + last) // 2
        first, last = (first, middle) if held(below(float(values[middle]), "right")) >= wanted else (middle + 1, last)
    lower, upper = below(float(values[first]), "left"), below(float(values[first]), "right")
    low, high = held(lower), held(upper)
    part = min(1.0, max(0.0, (wanted - low) / (high - low))) if high > low else 0.0
    return [one + part * (other - one) for one, other in zip(lower, upper, strict=True)]
