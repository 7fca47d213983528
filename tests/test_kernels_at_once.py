"""The whole operation in few launches, against its steps and the oracle; interpreted where there is no GPU."""

import math
import sys

import pytest
import torch
from forde_fast.kernels import at_once, repulsion, tiles
from test_kernels import DEVICE, EPS, make_rows
from test_precision import error, rounded_product

import forde_fast as ff
from forde_fast import operators, reference
from forde_fast.testing import CASES, make_particles, make_pca

LOG = math.log(5)


def by_steps(particles, product, normalize=True):
    d, alignment, norm = repulsion.pair_distances(particles, None, product, normalize, EPS)
    value, c, h, projection = repulsion.median_rule(d, alignment if normalize else None, LOG)
    return value, repulsion.combine(particles, None, product, norm, c, projection), h, d


@pytest.mark.parametrize("many", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_the_same_as_its_steps(dtype, many, monkeypatch):
    if many:
        monkeypatch.setattr(at_once, "MANY_SAMPLES", 1)
    particles = make_rows("duplicated", 5, 2, 21, dtype)
    z = repulsion.contrasts(particles, None, True, EPS)
    for product in (None, z * torch.linspace(1, 0.1, 21, dtype=z.dtype, device=DEVICE)):
        for normalize in (True, False):
            results = at_once.at_once(particles, product, None, 1.0, normalize, EPS, LOG)
            for got, want in zip(results, by_steps(particles, product, normalize), strict=True):
                assert got.dtype == want.dtype
                torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("tail", [0.0, 0.01])
@pytest.mark.parametrize("columns", ["whole", "split"])
def test_low_rank_in_float32(tail, columns, monkeypatch):
    if columns == "split":
        monkeypatch.setattr(tiles, "MANY_COLUMNS", 64)
    scale = make_pca(300, 20, tail)
    factor = scale.factors(torch.float32, torch.device(DEVICE))[0]
    for case in ("random", "close pair 1e-4", "duplicate"):
        particles = make_particles(case, (5, 2, 300), 0, torch.float32)
        exact, plain = (reference.repulsion(x, scale) for x in (particles.double(), particles))
        rows = particles.to(DEVICE)
        rest = rows, factor, factor, 1.0, tail, EPS, LOG, "ieee"
        value, gradient, h, d = (x.cpu() for x in at_once.at_once_low_rank(*rest))
        eps = torch.finfo(torch.float32).eps
        assert error(value, exact.value) <= 2 * error(plain.value, exact.value) + 8 * eps
        assert error(gradient, exact.gradient) <= 2 * error(plain.gradient, exact.gradient) + 8 * eps
        assert error(h, exact.bandwidth) < 1e-5
        assert case != "duplicate" or bool((d[-1, -2] == 0).all())


@pytest.mark.skipif(DEVICE == "cuda", reason="needs the interpreter, which emulates a GPU's roundings")
@pytest.mark.parametrize("kind", ["pca", "low rank"])
def test_float16_costs_no_more_than_tf32(kind, monkeypatch):
    """At every spread, against tf32 of the same contrasts: their roundings are emulated on the CPU."""
    scale = make_pca(300) if kind == "pca" else make_pca(300, 20, 0.01)
    for module in ("forde_fast.repulsion", "forde_fast.lengthscales.pca"):
        monkeypatch.setattr(sys.modules[module], "matmul", rounded_product)
    monkeypatch.setattr(sys.modules["forde_fast.repulsion"], "_rounds", lambda device: True)
    for case in CASES:
        particles = make_particles(case, (5, 1, 300), 0, torch.float32)
        exact = reference.repulsion(particles.double(), scale)
        norm = particles.norm(dim=-1, keepdim=True)
        half = ff.repulsion(particles.to(DEVICE), scale, backend="triton")
        # in steps, as a bandwidth is given: that way goes by the products above
        tf32 = ff.repulsion(particles, scale, backend="cpp", bandwidth=exact.bandwidth.float())
        half = half._replace(**{name: x.cpu() for name, x in half._asdict().items()})
        for got, rough, good in (
            (half.value, tf32.value, exact.value),
            (half.distances, tf32.distances, exact.distances),
            (half.gradient * norm, tf32.gradient * norm, exact.gradient * norm),
        ):
            assert bool(got.isfinite().all())
            assert float((got - good).norm()) <= 2 * float((rough - good).norm()) + 1e-4 * float(good.norm())


def test_the_most_particles_are_what_the_kernels_take():
    for dtype, most in operators.MOST_AT_ONCE.items():
        assert most == repulsion._most_rows_at_once(dtype) <= repulsion.ROWS_AT_ONCE
