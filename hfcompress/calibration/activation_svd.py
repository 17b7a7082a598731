"""Activation-aware low rank: the two thin factors that change least of what a layer says, by its principal components.

W (out, in) is to become B A, of rank r. Plain SVD minimises |W - B A|^2 (Eckart, Young 1936). What is lost, though, is

    mean |W x - B A x|^2 = |(W - B A) C^1/2|^2,    C = mean x x^T over the tokens of calibration data

which is least where B are the r leading eigenvectors of W C W^T, the principal components of what the layer says, and
A = B^T W. Nothing is inverted, so C may be singular: fewer tokens than columns, columns that are always zero. It is the
solution of DRONE (Chen et al. 2021) and of SVD-LLM (Wang et al. 2024, arXiv 2403.07378), which truncates W C^1/2 and multiplies
by C^-1/2 again. ASVD (Yuan et al. 2023, arXiv 2312.05821) takes the diagonal of C alone.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hfcompress.calibration.second_moments import DAMPING


@dataclass(frozen=True)
class Components:
    """A matrix by its components, from the one that matters most to the one that matters least."""

    matrix: Tensor
    """(out, in), float64: what is to be approximated."""
    left: Tensor
    """(out, k), float64: an orthonormal basis of what it says; k is the smaller side."""
    energies: Tensor
    """(k,), float64, descending: the mean square of what each component adds to the output; squared singular values where
    nothing is known of the inputs."""

    def factors(self, rank: int) -> tuple[Tensor, Tensor]:
        """`into` (rank, in) and `out` (out, rank) of the best approximation, float64.

        Each component has the same norm on either side, so that both factors learn at the same pace and neither leaves the
        range of half precision.
        """
        left = self.left[:, :rank]
        into = left.T @ self.matrix
        root = into.norm(dim=1).sqrt()
        return into / root.clamp_min(1e-150)[:, None], left * root


def components(weight: Tensor, square: Tensor | None = None) -> Components:
    """Those of `weight` (out, in) in the metric of `square`, the second moments of what it reads: (in, in), or (in,) where they
    are diagonal, as a table reads one column at a time. All directions are alike if there are none."""
    matrix = weight.double()
    if square is None:
        left, values, _ = torch.linalg.svd(matrix, full_matrices=False)
        return Components(matrix, left, values.square())
    tall = matrix.shape[0] > matrix.shape[1]
    basis, core = torch.linalg.qr(matrix) if tall else (None, matrix)
    square = square.to(core)
    gram = (core * square if square.dim() == 1 else core @ square) @ core.T
    energies, vectors = torch.linalg.eigh((gram + gram.T) / 2)
    energies, vectors = energies.flip(0).clamp_min(0), vectors.flip(1)
    return Components(matrix, vectors if basis is None else basis @ vectors, energies)


def damped(square: Tensor, damping: float = DAMPING) -> Tensor:
    """With the ridge that keeps directions alive which the samples hardly show: a share of the mean of the diagonal."""
    ridge = damping * square.diagonal().mean()
    return square + ridge * torch.eye(len(square), dtype=square.dtype, device=square.device)
