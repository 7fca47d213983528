"""Distances with guessed norms, against the formulas and the exact norms; interpreted where there is no GPU."""

import math

import numpy as np
import pytest
import torch
from forde_fast.kernels import repulsion, tiles
from test_kernels import DEVICE, EPS, check, plain_pair_distances

from forde_fast.testing import CASES, compare, make_particles

PIECES, PIECE = 8, 32


@pytest.fixture(autouse=True)
def unsound(monkeypatch):
    """Small shapes go this way, in more than one program; -> [[whether each sample was computed again], ...]."""
    monkeypatch.setattr(tiles, "MANY_COLUMNS", 1024)
    monkeypatch.setattr(tiles, "MANY_BYTES", 0)
    monkeypatch.setattr(tiles, "PIECES", PIECES)
    monkeypatch.setattr(tiles, "PIECE", PIECE)
    seen, launch = [], repulsion._launch

    def spy(kernel, programs, tensors, numbers, constants):
        launch(kernel, programs, tensors, numbers, constants)
        if kernel is repulsion._settle_kernel:
            seen.append([bool(x) for x in tensors[-1].cpu()])

    monkeypatch.setattr(repulsion, "_launch", spy)
    return seen


def sampled(columns):
    """The columns that norms are guessed from."""
    first = torch.arange(PIECES) * (columns - PIECE) // (PIECES - 1)
    return (first[:, None] + torch.arange(PIECE)).flatten()


def with_exact_norms(particles, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(tiles, "MANY_BYTES", 2**60)
        return repulsion.pair_distances(particles, None, None, True, EPS)


def pair_distances(particles):
    results = repulsion.pair_distances(particles.to(DEVICE), None, None, True, EPS)
    assert torch.equal(results[0], results[0].transpose(0, 1))
    assert not results[0].diagonal().any()
    assert not results[1].diagonal().any()
    return results


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(
    ("members", "columns", "dtype"), [(2, 1301, torch.float32), (10, 1302, torch.float32), (5, 1304, torch.bfloat16)]
)
def test_against_the_formula(case, members, columns, dtype, unsound):
    particles = make_particles(case, (members, 2, columns), members, dtype)
    check(pair_distances(particles), plain_pair_distances, particles.to(DEVICE), None, None, True)
    assert len(unsound) == 1
    if case in ("random", "duplicate", "zeros", "dead row") or case.startswith("spread"):
        assert unsound == [[False, False]]


@pytest.mark.skipif(np.finfo(np.longdouble).eps > 1e-18, reason="needs something wider than float64")
@pytest.mark.parametrize("case", CASES)
def test_float64_against_long_double(case):
    particles = make_particles(case, (5, 1, 1303), 0)
    results, rough = pair_distances(particles), plain_pair_distances(particles, None, None, True)
    wide = particles.numpy().astype(np.longdouble)
    norm = 1 / np.sqrt((wide * wide).sum(-1) + np.longdouble(EPS))
    s = wide * norm[..., None]
    difference = s[:, None] - s
    exact = (difference * difference).sum(-1), (difference * s[:, None]).sum(-1), norm
    for got, plain, good in zip(results, rough, exact, strict=True):
        error, allowed = (np.linalg.norm((x.cpu().numpy() - good).astype(np.float64)) for x in (got, plain))
        size = np.linalg.norm(good.astype(np.float64))
        assert error <= 4 * allowed + 8 * np.finfo(np.float64).eps * size  # as testing.budget has it


@pytest.mark.parametrize("case", ["random", "spread 1e-1", "spread 1e-3", "two clusters", "close pair 1e-4"])
def test_the_whole_operation(case, unsound):
    errors = compare("triton", case, (5, 1, 1301), torch.float32, draws=3, device=DEVICE)
    assert all(each.within for each in errors.values()), errors
    assert len(unsound) == 3


@pytest.mark.parametrize("others", [1e-3, 1.0, 1e3])
def test_scales_of_the_rows(others, unsound):
    """Rows that are close, but of other lengths."""
    for case in ("random", "spread 1e-2"):
        scales = torch.logspace(-6, 6, 5, dtype=torch.float64)[:, None, None] * others
        particles = (make_particles(case, (5, 1, 1301), 0) * scales).float()
        check(pair_distances(particles), plain_pair_distances, particles.to(DEVICE), None, None, True)
    assert unsound == [[False], [False]]


def test_rows_that_differ_by_a_scale():
    x = torch.randn(1, 1, 1301)
    d, alignment, norm = pair_distances(torch.cat([x, 4 * x, 1.1 * x, x]))
    assert not d[0, 1:4:2].any()
    assert not alignment[0, 1:4:2].any()
    assert norm[0] == norm[3] == 4 * norm[1]
    assert d.max() < 1e-13


@pytest.mark.parametrize("scale", [0.0, 1e-12, 1e-3, 1e6])
def test_a_sample_of_another_scale(scale, unsound):
    """The same columns of all rows: they still say how long one row is beside another, or nothing."""
    for case in ("random", "spread 1e-2", "duplicate"):
        particles = make_particles(case, (5, 1, 1301), 0, torch.float32)
        particles[:, :, sampled(1301)] *= scale
        d, *rest = pair_distances(particles)
        check((d, *rest), plain_pair_distances, particles.to(DEVICE), None, None, True)
        assert case != "duplicate" or not d[-1, -2].any()


def test_a_misleading_sample_costs_no_accuracy(unsound, monkeypatch):
    """Of the close rows of sample 1, the sampled columns have quite different lengths: it alone is computed again."""
    particles = make_particles("spread 1e-3", (5, 3, 1301), 0)
    particles[:, 1, sampled(1301)] *= torch.linspace(1e-6, 1e-3, 5, dtype=torch.float64)[:, None]
    particles = particles.float().to(DEVICE)
    results = pair_distances(particles)
    assert unsound == [[False, True, False]]
    for got, want in zip(results, with_exact_norms(particles, monkeypatch), strict=True):
        assert torch.equal(got[..., 1], want[..., 1])
        assert not torch.equal(got, want)
    check(results, plain_pair_distances, particles, None, None, True)


def test_a_row_beside_a_far_longer_guess(unsound):
    """Row 0, from which the others' squares are told, is sampled where there is next to nothing of it."""
    particles = make_particles("random", (3, 1, 1301), 0, torch.float32)
    particles[0, :, sampled(1301)] *= 1e-5
    check(pair_distances(particles), plain_pair_distances, particles.to(DEVICE), None, None, True)
    assert unsound == [[True]]


@pytest.mark.parametrize("bad", [math.nan, math.inf, 1e30])
@pytest.mark.parametrize("row", [0, 1])
@pytest.mark.parametrize("column", [0, 300])
def test_what_is_not_finite_arrives_as_with_exact_norms(bad, row, column, unsound, monkeypatch):
    particles = make_particles("random", (3, 2, 1301), 0, torch.float32).to(DEVICE)
    assert column == 0 or column not in sampled(1301)
    particles[row, 0, column] = bad
    results = repulsion.pair_distances(particles, None, None, True, EPS)
    assert unsound == [[True, False]]
    for got, want in zip(results, with_exact_norms(particles, monkeypatch), strict=True):
        torch.testing.assert_close(got, want, equal_nan=True)
    if bad != 1e30:
        assert bool(results[0][row, [n for n in range(3) if n != row], 0].isnan().all())


def test_without_eps(unsound, monkeypatch):
    particles = make_particles("dead row", (3, 2, 1301), 0, torch.float32).to(DEVICE)
    with monkeypatch.context() as patch:
        patch.setattr(tiles, "MANY_BYTES", 2**60)
        wanted = repulsion.pair_distances(particles, None, None, True, 0.0)
    for got, want in zip(repulsion.pair_distances(particles, None, None, True, 0.0), wanted, strict=True):
        torch.testing.assert_close(got, want, equal_nan=True)
    assert unsound == [[True, False]]


def test_who_goes_this_way(monkeypatch):
    monkeypatch.undo()
    for shape, once in (((10, 1, 11_173_962), True), ((10, 1, 2**20), False), ((10, 128, 2**20), False)):
        assert repulsion._passes_once(torch.empty(shape, device="meta")) == once
