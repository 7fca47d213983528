"""Directions from a few long vectors, without waiting for the device."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

SWEEPS = 8  # of rotations; each squares what is left off the diagonal, and 6 reach float64's rounding for M <= 64
TINY = 1e-12  # of the largest eigenvalue: below, what is left of a direction is rounding


def directions(
    rows: Tensor, count: int, largest: bool = False, total: Callable[[Tensor], Tensor] = lambda sum: sum
) -> Tensor:
    """Orthonormal combinations of the rows [M, D], in float64 [min(count, M), D]: w_q^-1/2 sum_p V_pq rows_p for the
    eigenvalues w and eigenvectors V of the rows' Gram matrix, with the smallest eigenvalues, ascending, or with the
    largest. A direction whose eigenvalue is 0 up to rounding is 0. `total` adds up sums over columns, where the rows
    have a part of them."""
    rows = rows.double()
    values, vectors = eigh(total(rows @ rows.T))
    kept = slice(len(rows) - min(count, len(rows)), None) if largest else slice(0, count)
    alive = values > TINY * values[-1]
    scales = torch.where(alive, values, 1.0).rsqrt() * alive
    return (vectors * scales).T[kept] @ rows


def eigh(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues [M], ascending, and eigenvectors [M, M] of a small symmetric matrix: torch.linalg.eigh on the CPU.

    On CUDA that would wait for the device, so that no step with it could be recorded; there it is `jacobi`.
    """
    return jacobi(matrix) if matrix.is_cuda else torch.linalg.eigh(matrix)


def jacobi(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """The same by plane rotations (Golub & Van Loan, section 8.5): every round zeroes the entries of M / 2 disjoint
    pairs at once, and the rounds of a sweep, as in a tournament, meet every pair."""
    size = len(matrix)
    even = size + size % 2  # an odd one plays against a row of zeros, with which no rotation mixes it
    players, half = torch.arange(even, device=matrix.device), even // 2
    rotated = torch.nn.functional.pad(matrix, (0, even - size, 0, even - size))
    vectors = torch.eye(even, dtype=matrix.dtype, device=matrix.device)
    for _ in range(SWEEPS * max(even - 1, 1)):
        rotation = _rotation(rotated, players[:half], players[half:].flip(0))
        rotated, vectors = rotation.T @ rotated @ rotation, vectors @ rotation
        players = torch.cat([players[:1], players[-1:], players[1:-1]])
    values, order = rotated.diagonal()[:size].sort()
    return values, vectors[:size, :size][:, order]


def _rotation(a: Tensor, p: Tensor, q: Tensor) -> Tensor:
    """[M, M], orthogonal, such that rotation^T a rotation is 0 at each (p, q)."""
    off = a[p, q]
    slope = (a[q, q] - a[p, p]) / torch.where(off == 0, 1.0, 2 * off)
    sign = torch.where(slope < 0, -1.0, 1.0)
    tangent = torch.where(off == 0, 0.0, sign / (slope.abs() + (1 + slope.square()).sqrt()))
    cosine = (1 + tangent.square()).rsqrt()
    sine = tangent * cosine
    rotation = torch.eye(len(a), dtype=a.dtype, device=a.device)
    rotation[p, p], rotation[q, q], rotation[p, q], rotation[q, p] = cosine, cosine, sine, -sine
    return rotation
