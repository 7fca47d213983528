"""The rule: bandwidths by loops, coefficients against autograd, the published weight-space kernel."""

import itertools
import math
import statistics
from pathlib import Path

import numpy as np
import pytest
import torch

import forde_fast as ff
from forde_fast import reference
from forde_fast.rule import bandwidth_of, kernel_rule, median

F64 = torch.float64
GOLDEN = np.load(Path(__file__).parent / "golden" / "weight_function_rde.npz")


def distances(first, second, groups):
    """Not symmetric, all different, with zeros on the diagonal."""
    d = torch.rand(first, second, groups, dtype=F64) + 0.1
    d[range(min(first, second)), range(min(first, second))] = 0
    return d


def slow_bandwidth(d, rule):
    """h [Mi, Mj, G] by Python's own median, which takes the mean of the middle two."""
    mi, mj, groups = d.shape
    h = torch.empty_like(d)
    count = mj + 1 if rule.add_one else max(mj, 2)
    for i, j, g in itertools.product(range(mi), range(mj), range(groups)):
        covered = {
            "particle": d[:, j, g] if rule.owner == "second" else d[i, :, g],
            "sample": d[:, :, g],
            "batch": d,
        }[rule.over]
        middle = statistics.median(covered.flatten().tolist())
        h[i, j, g] = (middle**2 if rule.squared else middle) / math.log(count) + 1e-12
    return h


RULES = [
    ff.Median(over, owner, add_one, squared)
    for over in ("particle", "sample", "batch")
    for owner in ("second", "first")
    for add_one in (False, True)
    for squared in (False, True)
]
# M even, odd, one and two; others of another number, down to one on either side
SHAPES = [(4, 4, 3), (5, 5, 3), (1, 1, 2), (2, 2, 1), (3, 6, 2), (1, 5, 2), (5, 1, 2)]


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_bandwidths_are_those_of_slow_loops(rule):
    for shape in SHAPES:
        d = distances(*shape)
        wanted = slow_bandwidth(d, rule)
        assert torch.allclose(bandwidth_of(d, rule).expand_as(d), wanted, rtol=1e-13)
        assert torch.allclose(reference.bandwidth_of(d, rule), wanted, rtol=1e-13)
        # what is reported: [Mi, G] where the first particle owns it, else [Mj, G]
        owned = wanted[:, 0] if rule.owner == "first" else wanted[0]
        _, _, reported = kernel_rule(d, rule)
        assert reported.shape == owned.shape
        assert torch.allclose(reported, owned, rtol=1e-13)


@pytest.mark.parametrize(
    ("values", "middle"),
    [([3.0, 1.0], 2.0), ([4.0, 1.0, 3.0, 2.0], 2.5), ([5.0, 0.0, 1.0], 1.0), ([7.0], 7.0)],
)
def test_median_is_the_mean_of_the_middle_two(values, middle):
    d = torch.tensor(values)[:, None, None].expand(-1, 2, 3)
    assert (median(d, (0,)) == middle).all()
    assert median(d, (0,)).shape == (1, 2, 3)
    assert (median(d.transpose(0, 1), (1,)) == middle).all()
    assert median(d, (0, 1, 2)) == middle


def test_published_default():
    d = distances(10, 10, 4)
    h = torch.tensor([[np.median(d[:, j, g]) for g in range(4)] for j in range(10)]) / math.log(10) + 1e-12
    for rule in ("median", ff.Median()):
        assert torch.allclose(bandwidth_of(d, rule)[0], h, rtol=1e-13)


def test_unknown_variants_are_named():
    with pytest.raises(ValueError, match=r"^over: expected particle, sample or batch, got member"):
        ff.Median(over="member")
    with pytest.raises(ValueError, match=r"^owner: expected second or first, got third"):
        ff.Median(owner="third")


GIVEN = {
    "number": lambda d: 0.3,
    "[]": lambda d: torch.tensor(0.3, dtype=F64),
    "[G]": lambda d: torch.rand(d.shape[2], dtype=F64) + 0.1,
    "[Mj, 1]": lambda d: torch.rand(d.shape[1], 1, dtype=F64) + 0.1,
    "[Mj, G]": lambda d: torch.rand(*d.shape[1:], dtype=F64) + 0.1,
    "median": lambda d: "median",
    "first": lambda d: ff.Median(owner="first"),
    "sample": lambda d: ff.Median(over="sample", squared=True),
}


@pytest.mark.parametrize("make", GIVEN.values(), ids=GIVEN)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_coefficients_are_twice_the_values_derivative(shape, make):
    """d = |s_i - s_j|^2 under C: dR/ds_i = sum_j 2 (dR/dd_ij) C (s_i - s_j), with h held constant."""
    d = distances(*shape)
    bandwidth = make(d)
    value, c, h = kernel_rule(d, bandwidth)
    graph = d.clone().requires_grad_()
    constant = reference.bandwidth_of(d, bandwidth)
    exact = reference.value(graph, constant)
    (slope,) = torch.autograd.grad(exact, graph)
    assert torch.allclose(value, exact, rtol=1e-12, atol=1e-15)
    assert torch.allclose(c, torch.where(d == 0, 0, 2 * slope), rtol=1e-11, atol=0)
    assert (c <= 0).all()  # descending R moves apart
    owner = getattr(bandwidth, "owner", "second")
    assert torch.allclose(h, constant[:, 0] if owner == "first" else constant[0], rtol=1e-14)
    kernel = torch.exp(-d.double() / constant)
    weights = kernel / kernel.sum((1, 2), keepdim=True)
    assert torch.allclose(weights, reference.weights(d, constant), rtol=1e-12)
    assert torch.allclose(weights.sum((1, 2)), torch.ones(shape[0], dtype=F64))


def test_identical_particles_have_no_coefficient():
    """h = 1e-12 there: c would be 1e12 times a difference that is 0."""
    value, c, h = kernel_rule(torch.zeros(4, 4, 3))
    assert value == pytest.approx(4 * math.log(4) / 3)
    assert (c == 0).all()
    assert torch.equal(h, torch.full((4, 3), 1e-12))


def test_float32_distances_have_float64_arithmetic():
    d = distances(10, 10, 128).float()
    exact = kernel_rule(d.double())
    for part, wide in zip(kernel_rule(d), exact, strict=True):
        assert part.dtype == torch.float32
        assert torch.equal(part, wide.float())


WEIGHT_RDE = ff.Median(over="sample", add_one=True)


@pytest.mark.parametrize("backend", ["reference", "cpp"])
@pytest.mark.parametrize("members", [2, 5, 10])
def test_published_weight_space_kernel(members, backend):
    """Golden kde, sum_j grad_i k_ij / sum_j k_ij, is the gradient of log sum_j k_ij, thus R's own."""
    particles, kernel, kde = (
        torch.from_numpy(GOLDEN[f"m{members}_{name}"]) for name in ("particles", "kernel", "kde")
    )
    if not ff.available_backends()[backend]:
        pytest.skip(f"waits for the {backend} backend")
    result = ff.repulsion(particles[:, None], normalize=False, bandwidth=WEIGHT_RDE, backend=backend)
    assert torch.allclose(torch.exp(-result.distances / result.bandwidth)[..., 0], kernel, rtol=1e-10)
    assert float((result.gradient[:, 0] - kde).norm() / kde.norm()) < 1e-10
    assert float(result.value) == pytest.approx(float(kernel.sum(1).log().sum()), rel=1e-10)
    step = particles - 0.1 * result.gradient[:, 0]
    assert torch.pdist(step).mean() > torch.pdist(particles).mean()


def test_others_so_far_away_that_every_kernel_value_underflows():
    """Without self-distances no row holds an exp(0): the logarithm of the sum must not be that of 0."""
    particles, others = torch.randn(3, 2, 5, dtype=torch.float64), torch.randn(4, 2, 5, dtype=torch.float64) + 50
    far = torch.cat([particles[:1] + 100, particles[1:]])  # the median, and so h, is that of the near ones
    for x, rule in ((particles, 1e-3), (far, "median"), (far, ff.Median(over="batch"))):
        exact = reference.repulsion(x, None, others, normalize=False, bandwidth=rule)
        for backend in (name for name, usable in ff.available_backends().items() if usable):
            result = ff.repulsion(x, others=others, normalize=False, bandwidth=rule, backend=backend)
            assert torch.allclose(result.value, exact.value, rtol=1e-10)
            assert torch.allclose(result.gradient, exact.gradient, rtol=1e-8)


@pytest.mark.parametrize(
    "shape", [(1, 1, 3), (2, 2, 16), (10, 10, 37), (5, 3, 17), (33, 4, 18), (40, 40, 2)], ids=str
)
@pytest.mark.parametrize("dtype", [torch.float32, F64], ids=str)
def test_fused_median_rule(shape, dtype, capability):
    """Few rows are sorted, many selected from; groups that fill the lanes and that do not."""
    d, alignment = distances(*shape).to(dtype), torch.randn(shape).to(dtype)
    log_count = ff.Median().log_count(d.shape[1])
    value, c, h, projection = torch.ops.forde_fast.median_rule(d, alignment, log_count)
    exact = kernel_rule(d.double())
    for part, wide in zip((value, c, h), exact, strict=True):
        assert torch.allclose(part.double(), wide, rtol=4 * torch.finfo(dtype).eps, atol=1e-15)
    assert torch.allclose(projection, (c * alignment).sum(1), rtol=1e-5, atol=1e-6)
    assert (torch.ops.forde_fast.median_rule(d, None, log_count)[3] == 0).all()
    d[0, 0, 0] = float("inf")
    assert torch.ops.forde_fast.median_rule(d, alignment, log_count)[0].isnan()
