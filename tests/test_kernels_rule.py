"""The Triton median rule against forde_fast/rule.py, in interpreter mode on CPU tensors where there is no GPU."""

import math

import pytest
import torch
from forde_fast.kernels import repulsion
from test_kernels import DEVICE, check

from forde_fast.rule import kernel_rule

SHAPES = [  # Mi, Mj, G
    (1, 1, 3),
    (2, 2, 1),  # the median is the mean of all there is
    (3, 3, 40),  # an odd number of rows; more samples than a program has
    (10, 10, 5),
    (33, 2, 1),  # a sort of 64
    (2, 33, 3),  # three blocks of j, the last not full
]


def make_distances(shape, dtype=torch.float32):
    d, alignment = torch.rand(shape, dtype=dtype) + 0.1, torch.randn(shape, dtype=dtype)
    d[range(min(shape[:2])), range(min(shape[:2]))] = 0
    return d.to(DEVICE), alignment.to(DEVICE)


def log_count(d):
    return math.log(max(d.shape[1], 2))


def plain_rule(d, alignment):
    value, c, h = kernel_rule(d)
    return value, c, h, (c * alignment).sum(1)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_shapes(shape, dtype):
    d, alignment = make_distances(shape, dtype)
    results = repulsion.median_rule(d, alignment, log_count(d))
    assert {part.dtype for part in results} == {dtype}
    check(results, plain_rule, d, alignment)


def test_columns_split_over_programs(monkeypatch):
    d, alignment = make_distances((3, 3, 45))
    turned = [x.transpose(0, 2).contiguous().transpose(0, 2) for x in (d, alignment)]
    whole = repulsion.median_rule(d, alignment, log_count(d))
    monkeypatch.setattr(repulsion, "PROGRAMS", 3)  # six steps each; the last has none of its own
    results = repulsion.median_rule(*turned, log_count(d))
    for part, same in zip(results, whole, strict=True):
        torch.testing.assert_close(part, same, rtol=1e-6, atol=0)


def test_identical_particles_have_no_coefficient():
    d = torch.zeros(4, 4, 3, device=DEVICE)
    value, c, h, projection = repulsion.median_rule(d, d, log_count(d))
    assert float(value) == pytest.approx(4 * math.log(4) / 3)
    assert not c.any()
    assert not projection.any()
    assert torch.equal(h, torch.full_like(h, 1e-12))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_reaches_the_value(bad):
    d, alignment = make_distances((5, 5, 4))
    d[1, 2, 3] = bad
    value, _, h, _ = repulsion.median_rule(d, alignment, log_count(d))
    assert value.isnan()
    expected = torch.zeros_like(h, dtype=torch.bool)
    expected[2, 3] = math.isnan(bad)
    assert torch.equal(h.isnan(), expected)
