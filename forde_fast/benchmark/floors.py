"""The time that no implementation can beat by much.

On a CPU it is measured, in the same rounds:

    a basis of full rank  the product of the M B rows with a D x D matrix, alone
    a thin basis          the two products with it, alone
    the cosines           the products along every axis of an image, there and back, alone
    the identity          reading the particles and writing a fresh output of their size (a clone); where the M rows
                          of a sample do not stay on the chip between distances and gradient, reading them once more
                          (a sum)

On a GPU it is counted: the largest of bytes over the bandwidth of a copy, the products' FLOP over the rate of a large
matrix product in the precision used, and the pairs' FLOP over that of one in float32; the rates are measured.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from forde_fast.benchmark.cases import DTYPES, IMAGES, Case
from forde_fast.precision import products_in
from forde_fast.timing import interleaved, quantiles

ON_CHIP = {"cpu": 512 << 10, "cuda": 227 << 10}  # bytes: level-2 cache of a core, shared memory of a multiprocessor


def count(case: Case) -> tuple[int, int, int]:
    """Bytes that must be moved, FLOP of the matrix products, FLOP of the pairs.

    The gradient is written once. The particles are read once where nothing forces a second reading: with a basis of
    full rank (which is read too), or where a sample's rows stay on the chip; else twice, and a thin basis with them.
    The cosines' products are one small matrix per axis of an image, there and back. A pair costs 8 FLOP per column: 3
    for its distance, 5 for its part in two gradients.
    """
    (members, batch, size), rank = case.shape, case.rank
    element = DTYPES[case.dtype].itemsize
    data, basis = members * batch * size * element, size * rank * max(element, 4)
    pairs = 8 * members * (members - 1) // 2 * batch * size
    if rank == size:
        return 2 * data + basis, 2 * members * batch * size * size, pairs
    if rank:
        return 3 * data + 2 * basis, 4 * members * batch * size * rank, pairs
    products = 4 * members * batch * size * sum(IMAGES[size]) if case.lengthscale == "cosine" else 0
    return (2 if _stays_on_chip(case) else 3) * data, products, pairs


def _stays_on_chip(case: Case) -> bool:
    members, _, size = case.shape
    return members * size * DTYPES[case.dtype].itemsize <= ON_CHIP[case.device]


def floor_of(case: Case, particles: Tensor, scale) -> tuple[str, Callable[[], object] | float]:
    """What the floor is; on a CPU the call that is to be timed as it, on a GPU its seconds."""
    if case.device == "cuda":
        moved, products, pairs = count(case)
        rates = peaks()
        bounds = {"bytes": moved / rates["copy"], "products": products / rates[case.precision]}
        bounds["pairs"] = pairs / rates["ieee"]
        return max(bounds.items(), key=lambda bound: bound[1])
    if scale is None:
        if _stays_on_chip(case):
            return "clone", particles.clone
        return "sum and clone", lambda: (particles.sum(), particles.clone())
    rows = particles.flatten(0, 1).to(torch.promote_types(particles.dtype, torch.float32))
    if case.lengthscale == "cosine":
        return "products along the axes", lambda: scale.product(rows)
    basis = scale.eigenvectors.to(rows)
    if case.rank == case.shape[2]:
        return "product", lambda: rows @ basis
    return "two thin products", lambda: rows @ basis @ basis.T


@functools.cache
def peaks() -> dict[str, float]:
    """Measured rates of this GPU: bytes per second of a copy (read and written), FLOP per second of matrix products
    in "ieee" float32, "tf32" and "bfloat16"."""
    source = torch.randn(1 << 28, device="cuda")
    a, b = torch.randn(2, 8192, 8192, device="cuda")
    x, y = a.bfloat16(), b.bfloat16()
    found = {"copy": 2 * source.nbytes / _seconds(source.clone), "bfloat16": 2 * 8192**3 / _seconds(lambda: x @ y)}
    for precision in ("ieee", "tf32"):
        with products_in(precision):
            found[precision] = 2 * 8192**3 / _seconds(lambda: a @ b)
    return found


def _seconds(call: Callable[[], object]) -> float:
    return quantiles(interleaved({"": call}, 20, "cuda")[""])[1]
