"""Inputs and error budgets for tests, benchmarks and `forde-fast verify`.

A fast path is judged by data: its error against the float64 oracle may be at most 2 times that of plain PyTorch
(the oracle itself) in the same precision, plus 8 eps. Norms are pooled over several draws, since the ratio of two
rounding errors of one draw is luck.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from forde_fast import reference
from forde_fast.lengthscales import PCA
from forde_fast.repulsion import repulsion

DRAWS = 5

Shape = tuple[int, int, int]  # M, G, D


def _normal(shape, generator) -> Tensor:
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def _spread(width: float) -> Callable[[Shape, torch.Generator], Tensor]:
    return lambda shape, g: _normal((1, *shape[1:]), g) + width * _normal(shape, g)


def _clusters(shape, g):
    centres = _normal((2, *shape[1:]), g)
    return centres[torch.arange(shape[0]) % 2] + 1e-3 * _normal(shape, g)


def _close_pair(width: float) -> Callable[[Shape, torch.Generator], Tensor]:
    def make(shape, g):
        particles = _normal(shape, g)
        particles[-1] = particles[max(shape[0] - 2, 0)] + width * _normal(shape[1:], g)
        return particles

    return make


def _dead_row(shape, g):
    particles = _normal(shape, g)
    particles[0, 0] = 0
    return particles


CASES: dict[str, Callable[[Shape, torch.Generator], Tensor]] = {
    "random": _normal,
    "spread 1e-1": _spread(1e-1),
    "spread 1e-2": _spread(1e-2),
    "spread 1e-3": _spread(1e-3),
    "two clusters": _clusters,
    "close pair 1e-2": _close_pair(1e-2),
    "close pair 1e-4": _close_pair(1e-4),
    "duplicate": _close_pair(0.0),
    "zeros": lambda shape, g: torch.zeros(shape, dtype=torch.float64),
    "dead row": _dead_row,
}


def make_particles(case: str, shape: Shape, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """Particles [M, G, D] of the named case of `CASES`, drawn from `seed` in float64 and rounded to `dtype`."""
    return CASES[case](shape, torch.Generator().manual_seed(seed)).to(dtype)


@functools.lru_cache(maxsize=8)
def make_pca(dimension: int, rank: int | None = None, tail: float = 0.0, seed: int = 0) -> PCA:
    """A random orthonormal basis with eigenvalues from 100 down to 0.01, as images have; its first `rank` columns."""
    generator = torch.Generator().manual_seed(seed)
    basis = torch.linalg.qr(_normal((dimension, dimension), generator))[0]
    eigenvalues = torch.logspace(2, -2, dimension, dtype=torch.float64)
    rank = dimension if rank is None else rank
    return PCA(basis[:, :rank], eigenvalues[:rank], tail)


class Errors(NamedTuple):
    """Pooled relative errors against float64: of the backend, of plain PyTorch, and the most the first may be."""

    error: float
    plain: float
    budget: float

    @property
    def within(self) -> bool:
        return self.error <= self.budget  # false for NaN


def compare(backend: str, case: str, shape: Shape, dtype: torch.dtype, lengthscale=None, draws=DRAWS, device="cpu"):
    """{"value": Errors, "gradient": Errors} of a backend on `draws` draws of a case.

    The gradient's rows are multiplied by their particles' norms: a dead row, whose own is of order
    1 / sqrt(eps), would otherwise be all that counts.
    """
    fast, plain = {"value": [], "gradient": []}, {"value": [], "gradient": []}
    for seed in range(draws):
        rounded = make_particles(case, shape, seed, dtype)
        for pools, result, inputs in (
            (fast, repulsion(rounded.to(device), lengthscale, backend=backend), rounded),
            (plain, None, rounded.bfloat16() if dtype == torch.bfloat16 else rounded.float()),
        ):
            exact = reference.repulsion(inputs.double(), lengthscale)
            result = result or reference.repulsion(inputs.float(), lengthscale)
            norms = (inputs.double().square().sum(-1, keepdim=True) + 1e-24).sqrt()
            gradients = [r.gradient.cpu().double() * norms for r in (result, exact)]
            if bool((inputs == inputs[:1]).all()):
                # identical particles do not repel; the oracle's rounding times 1 / h = 1e12 would stand for that 0
                gradients[1] = torch.zeros_like(gradients[1])
                gradients[0] = gradients[0] if pools is fast else gradients[1]
            pools["gradient"].append(gradients)
            pools["value"].append((result.value.cpu().double(), exact.value))
    return {what: _errors(_pooled(fast[what]), _pooled(plain[what]), dtype, what) for what in fast}


def _errors(error: float, plain: float, dtype: torch.dtype, what: str) -> Errors:
    return Errors(error, plain, budget(plain, dtype, rounded=what == "gradient"))


def _pooled(pool) -> float:
    """|x - exact| / |exact| over all draws; absolute where all that is exact is 0."""
    error = sum((x - exact).square().sum() for x, exact in pool)
    size = sum(exact.square().sum() for _, exact in pool)
    return float((error / (size if size > 0 else 1)).sqrt())


def budget(plain: float, dtype: torch.dtype, rounded: bool = False) -> float:
    """2 plain + 8 eps, both of float32; a bfloat16 result has one rounding of its own.

    In float64 the oracle has the error that it should judge, 1e-10 where pairs 1e-4 apart differ across the heaviest
    directions: 1e-9 is allowed. (The published code's results are held to 1e-10.)
    """
    if dtype == torch.float64:
        return 1e-9
    own = torch.finfo(torch.bfloat16).eps / 2 if rounded and dtype == torch.bfloat16 else 0.0
    return 2 * plain + 8 * torch.finfo(torch.float32).eps + own
