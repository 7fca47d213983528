"""Inputs and error budgets for tests, benchmarks and `forde-fast verify`.

A fast path is judged by data: its error against the float64 oracle may be at most 2 times that of plain PyTorch
(the oracle itself) in the same precision, plus 8 eps. Float64 is judged by long double, where the machine has it.
Norms are pooled over several draws, since the ratio of two rounding errors of one draw is luck.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from forde_fast import reference
from forde_fast.lengthscales import PCA, Cosine, Identity
from forde_fast.precision import products_in
from forde_fast.repulsion import repulsion
from forde_fast.types import Repulsion

DRAWS = 5

Shape = tuple[int, int, int]  # M, G, D


def _normal(shape, generator) -> Tensor:
    return torch.randn(shape, generator=generator, dtype=torch.float64, device="cpu")


def _spread(width: float) -> Callable[[Shape, torch.Generator], Tensor]:
    return lambda shape, g: _normal((1, *shape[1:]), g) + width * _normal(shape, g)


def _clusters(shape, g):
    centres = _normal((2, *shape[1:]), g)
    return centres[torch.arange(shape[0], device="cpu") % 2] + 1e-3 * _normal(shape, g)


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


def _scaled_twins(shape, g):
    """More than half of the rows are the same when normalised, each twice the one before, one with other zeros."""
    particles = _normal(shape, g)
    particles[..., : shape[2] // 4] = 0
    for n in range(1, shape[0] // 2 + 1):
        particles[n] = 2 * particles[n - 1]
    particles[0, :, : shape[2] // 4] = -0.0
    return particles


CASES: dict[str, Callable[[Shape, torch.Generator], Tensor]] = {
    "random": _normal,  # spread 1
    "spread 6e-1": _spread(6e-1),  # where products of the rows take the place of differences on a CPU
    "spread 1e-1": _spread(1e-1),
    "spread 1e-2": _spread(1e-2),
    "spread 1e-3": _spread(1e-3),
    "two clusters": _clusters,
    "close pair 1e-2": _close_pair(1e-2),
    "close pair 1e-4": _close_pair(1e-4),
    "duplicate": _close_pair(0.0),
    "scaled twins": _scaled_twins,
    "zeros": lambda shape, g: torch.zeros(shape, dtype=torch.float64, device="cpu"),
    "dead row": _dead_row,
}


def make_particles(case: str, shape: Shape, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """Particles [M, G, D] of the named case of `CASES`, drawn from `seed` in float64 and rounded to `dtype`."""
    return CASES[case](shape, torch.Generator().manual_seed(seed)).to(dtype)


def _orthonormal(size: int, generator) -> Tensor:
    """A random basis [D, D]; beyond 1024 the Kronecker product of two, as QR takes D^3."""
    first = max(k for k in range(1, math.isqrt(size) + 1) if size % k == 0) if size > 1024 else 1
    return torch.kron(*(torch.linalg.qr(_normal((k, k), generator))[0] for k in (first, size // first)))


@functools.lru_cache(maxsize=8)
def make_pca(dimension: int, rank: int | None = None, tail: float = 0.0, seed: int = 0) -> PCA:
    """A random orthonormal basis with eigenvalues from 100 down to 0.01, as images have; its first `rank` columns."""
    generator = torch.Generator().manual_seed(seed)
    basis = _orthonormal(dimension, generator)
    eigenvalues = torch.logspace(2, -2, dimension, dtype=torch.float64, device="cpu")
    rank = dimension if rank is None else rank
    return PCA(basis[:, :rank], eigenvalues[:rank], tail)


LENGTHSCALES = ("identity", "pca", "pca low rank", "cosine")


@functools.lru_cache(maxsize=16)
def make_lengthscale(kind: str, dimension: int):
    """One of LENGTHSCALES for D = dimension, with weights that differ by 10^4, as those of images do."""
    if kind == "cosine":
        shape = (3, dimension // 3) if dimension % 3 == 0 else (dimension,)
        return Cosine(torch.logspace(2, -2, dimension, dtype=torch.float64, device="cpu").view(shape))
    low = {"rank": 1 + dimension // 4, "tail": 0.01} if kind == "pca low rank" else {}
    return Identity() if kind == "identity" else make_pca(dimension, **low)


class Errors(NamedTuple):
    """Pooled relative errors against float64: of the backend, of plain PyTorch, and the most the first may be."""

    error: float
    plain: float
    budget: float

    @property
    def within(self) -> bool:
        return self.error <= self.budget  # false for NaN


def compare(backend: str, case: str, shape: Shape, dtype: torch.dtype, lengthscale=None, draws=DRAWS, device="cpu",
            **options) -> dict[str, Errors]:  # fmt: skip
    """{"value": Errors, "gradient": Errors} of a backend on `draws` draws of a case; options go to the operation.

    The gradient's rows are multiplied by their particles' norms: a dead row, whose own is of order
    1 / sqrt(eps), would otherwise be all that counts. With `precision="tf32"` on CUDA, plain PyTorch has its own
    products in tf32 there.
    """
    plain_on = device if device != "cpu" and options.get("precision") == "tf32" else "cpu"
    lengthscale = Identity() if lengthscale is None else lengthscale
    pools = {(who, what): [] for who in ("fast", "plain") for what in ("value", "gradient")}
    for seed in range(draws):
        inputs, exact, plain = _draw(case, shape, seed, dtype, lengthscale, plain_on)
        fast = repulsion(inputs.to(device), lengthscale, backend=backend, **options)
        norms = (inputs.double().square().sum(-1, keepdim=True) + 1e-24).sqrt()
        alike = bool((inputs * norms[:1] == inputs[:1] * norms).all())
        for who, result in (("fast", fast), ("plain", plain)):
            pools[who, "value"].append((result.value.cpu().double(), exact[0]))
            gradient, truth = (x.cpu().double() * norms for x in (result.gradient, exact[1]))
            if alike:
                # identical particles do not repel; the oracle's rounding times 1 / h = 1e12 would stand for that 0
                truth = torch.zeros_like(truth)
                gradient = gradient if who == "fast" else truth
            pools[who, "gradient"].append((gradient, truth))
    wide = dtype == torch.float64 and _fits_long_double(shape)
    pooled = {key: _pooled(pool) for key, pool in pools.items()}
    return {
        what: Errors(error, plain, budget(plain, dtype, what == "gradient", wide))
        for what in ("value", "gradient")
        for error, plain in [(pooled["fast", what], pooled["plain", what])]
    }


@functools.lru_cache(maxsize=2 * DRAWS)
def _draw(case: str, shape: Shape, seed: int, dtype: torch.dtype, lengthscale, device: str):
    """Inputs, the exact value and gradient for them, and plain PyTorch's result in their precision: on the CPU by one
    or two threads, whichever is farther off, or in tf32 on a CUDA `device`."""
    inputs = make_particles(case, shape, seed, dtype)
    rounded = (inputs.float() if dtype == torch.bfloat16 else inputs).to(device)
    if dtype == torch.float64 and _fits_long_double(shape):
        exact = _in_long_double(inputs, lengthscale)
    else:
        exact = reference.repulsion(inputs.double(), lengthscale)[:2]
    if device == "cpu":
        plain = max((_by_threads(n, rounded, lengthscale) for n in (1, 2)), key=lambda own: _off(own, exact))
    else:
        with products_in("tf32"):
            plain = reference.repulsion(rounded, lengthscale)
    return inputs, exact, plain


def _by_threads(threads: int, particles: Tensor, lengthscale) -> Repulsion:
    """Plain PyTorch's result. Libraries split a product otherwise for other threads: MKL with AVX-512 rounds rows
    that are nearly equal alike by one thread, which hides two thirds of their difference's error, and not by two."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        return reference.repulsion(particles, lengthscale)
    finally:
        torch.set_num_threads(before)


def _off(result: Repulsion, exact) -> float:
    return float((result.gradient.double() - exact[1]).norm())


def _fits_long_double(shape: Shape) -> bool:
    """Whether something wider than float64 exists here, is quick enough (it has no BLAS) and would say something.

    With few columns one sample, whose difference lies across the heaviest directions, is all that is pooled: the
    ratio of two rounding errors of one number is luck.
    """
    members, groups, size = shape
    return np.finfo(np.longdouble).eps < 1e-18 and size >= 30 and members * groups * size**2 <= 2e6


@functools.lru_cache(maxsize=4)
def _long_basis(lengthscale, size: int):
    """X [D, K] with C = X X^T, in long double."""
    return lengthscale.coordinates(torch.eye(size, dtype=torch.float64)).numpy().astype(np.longdouble)


def _in_long_double(particles: Tensor, lengthscale, eps: float = 1e-24) -> tuple[Tensor, Tensor]:
    """Value and gradient by the closed form, in long double: what judges float64."""
    members, groups, size = particles.shape
    x, basis = particles.numpy().astype(np.longdouble), _long_basis(lengthscale, size)
    norm = np.sqrt((x * x).sum(-1, keepdims=True) + np.longdouble(eps))
    s = x / norm
    y = s @ basis
    difference = y[:, None] - y[None]  # [M, M, G, K]
    d = (difference * difference).sum(-1)
    h = np.median(d, axis=0) / np.log(np.longdouble(max(members, 2))) + np.longdouble("1e-12")
    kernel = np.exp(-d / h)
    rows = kernel.sum((1, 2), keepdims=True)
    c = kernel / rows / h * (-2 / np.longdouble(groups))
    g = (c[..., None] * difference).sum(1) @ basis.T
    gradient = (g - (g * s).sum(-1, keepdims=True) * s) / norm
    value = (np.log(rows / groups)).sum() / groups
    return torch.tensor(float(value), dtype=torch.float64), torch.from_numpy(gradient.astype(np.float64))


def _pooled(pool) -> float:
    """|x - exact| / |exact| over all draws; absolute where all that is exact is 0."""
    error = sum((x - exact).square().sum() for x, exact in pool)
    size = sum(exact.square().sum() for _, exact in pool)
    return math.sqrt(error / (size if size > 0 else 1))


def budget(plain: float, dtype: torch.dtype, rounded: bool = False, wide: bool = False) -> float:
    """2 plain + 8 eps of float32; a bfloat16 result has one rounding of its own.

    In float64, 4 plain + 8 eps if `wide`: judged in long double. (Not 2: in float32, up to 256 columns are computed
    in float64, and what the contrasts add to the rounding is never seen.) Float64 itself cannot judge it, since the
    oracle has the error that it should judge, 1e-10 where pairs 1e-4 apart differ across the heaviest directions:
    1e-9 is allowed.
    """
    if dtype == torch.float64:
        return 4 * plain + 8 * torch.finfo(dtype).eps if wide else 1e-9
    own = torch.finfo(torch.bfloat16).eps / 2 if rounded and dtype == torch.bfloat16 else 0.0
    return 2 * plain + 8 * torch.finfo(torch.float32).eps + own
