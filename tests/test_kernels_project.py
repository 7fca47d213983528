"""Triton's way between D columns and K, in interpreter mode on CPU tensors where there is no GPU."""

import math

import pytest
import torch
from forde_fast.kernels import low_rank, tiles
from test_kernels import DEVICE, EPS, check, make_rows, path, plain_rows  # noqa: F401 (path is a fixture)


def plain_project(particles, mixed, others, coefficients, normalize):
    rows, norm = plain_rows(particles, others, normalize)
    M = len(particles)
    s, sum_ = rows[:M], mixed
    if coefficients is not None:
        s_j = s if others is None else rows[M:]
        sum_ = mixed + (coefficients[..., None] * (s[:, None] - s_j)).sum(1)
    if not normalize:
        return sum_
    return (sum_ - (sum_ * s).sum(-1, keepdim=True) * s) * norm[:M, :, None]


def run(particles, others, weighted, normalize, dtype=torch.float32):
    M, G, D = particles.shape
    mixed = torch.randn(M, G, D, dtype=dtype).to(DEVICE)
    weights = None
    if weighted:
        weights = torch.randn(M, M if others is None else len(others), G, dtype=dtype).to(DEVICE)
    gradient = low_rank.project(particles, mixed, others, weights, normalize, EPS)
    assert gradient.dtype == particles.dtype
    assert gradient.is_contiguous()
    check(gradient, plain_project, particles, mixed, others, weights, normalize)
    return gradient


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize(("members", "others"), [(1, None), (5, None), (3, 2)])
def test_project(members, others, weighted, path):  # noqa: F811
    particles = make_rows("random", members, 2, 24)
    others = None if others is None else make_rows("random", others, 2, 24, seed=1)
    gradient = run(particles, others, weighted, True)
    size = gradient.norm() * particles.norm()
    assert float((gradient * particles).sum(-1).abs().max()) <= 1e-6 * size
    run(particles.transpose(0, 1).contiguous().transpose(0, 1), others, weighted, False)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_project_types(dtype, weighted):
    acc = torch.float64 if dtype == torch.float64 else torch.float32
    run(make_rows("close", 4, 2, 7, dtype), None, weighted, True, acc)


@pytest.mark.parametrize("weighted", [False, True])
def test_project_with_columns_split_over_programs(monkeypatch, weighted):
    monkeypatch.setattr(tiles, "MANY_COLUMNS", 1024)
    run(make_rows("random", 3, 1, 1300), None, weighted, True)


def test_project_of_dead_rows():
    zeros = torch.zeros(3, 2, 24, device=DEVICE)
    assert not low_rank.project(zeros, zeros, None, None, True, EPS).any()


@pytest.mark.parametrize("others", [None, 4])
def test_equal_rows_have_equal_coordinates(others):
    """Rows alike in their first columns are not equal; 0 and -0 are, and twice a row; the first of a chain stands for
    all."""
    particles = make_rows("random", 5, 2, 300)
    particles[:, 1, :40] = 0
    particles[2, 0] = particles[4, 0] = particles[0, 0]
    particles[3, 1] = particles[1, 1]
    particles[3, 1, :40] = -0.0
    if others is not None:
        others = make_rows("random", others, 2, 300, seed=1)
        others[3] = particles[1]
        others[0] = others[2]
    N = 5 + (0 if others is None else len(others))
    product = torch.randn(N - 1, 2, 270).to(DEVICE)
    rows = particles if others is None else torch.cat([particles, others])
    particles = particles * torch.tensor([1.0, 2.0, 0.25, 4.0, 8.0], device=DEVICE)[:, None, None]
    x = low_rank.coordinates(particles, others, product, True, EPS)
    assert not torch.equal(low_rank.coordinates(particles, others, product, False, EPS), x)
    plain = torch.cat([product.sum(0, keepdim=True) / (math.sqrt(N) - 1), product])
    for n in range(N):
        for g in range(2):
            source = next(m for m in range(n + 1) if torch.equal(rows[m, g], rows[n, g]))
            assert torch.equal(x[n, g], x[source, g])
            torch.testing.assert_close(x[n, g], plain[source, g], rtol=1e-5, atol=1e-5)


def test_two_rows_of_few_columns():
    particles, product = make_rows("duplicated", 2, 1, 7), torch.randn(1, 1, 3).to(DEVICE)
    x = low_rank.coordinates(particles, None, product, True, EPS)
    assert torch.equal(x[0], x[1])
