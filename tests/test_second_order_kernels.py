"""The Triton passes of a normalisation against the formulas, by the interpreter where there is no GPU."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")
from forde_fast.kernels import layouts as layouts_kernels
from forde_fast.kernels import second_order as kernels

from forde_fast.second_order import reference

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SHAPES = [(5, 3), (70, 40), (3, 5, 2, 3), (2, 6, 4, 9)]  # one tile cut short, several tiles, planes, both
COMBINATIONS = [(False, False, False), (True, False, True), (True, True, False), (False, True, True)]


def layouts(*tensors):
    yield tensors
    if tensors[0].ndim == 4:
        yield [t.contiguous(memory_format=torch.channels_last) for t in tensors]


def passes(module, x, residual, g, u, u_residual, v, weight, bias, relu, constant):
    """Every pass, each on what the one before it gave."""
    statistics = module.norm_statistics(x, 1e-5)
    if constant:
        statistics = torch.cat([statistics[:2], torch.zeros_like(statistics[:1]), statistics[3:]])
    layer = (statistics, weight, bias, relu)
    out = module.norm_forward(x, residual, *layer)
    z = out if residual is not None and relu else None
    sums = module.norm_backward_sums(g, x, z, *layer)
    first = module.norm_backward(g, x, z, *layer, sums, residual is not None)
    double_sums = module.norm_double_sums(u, g, x, z, *layer)
    if v is not None:
        double_sums = torch.cat([double_sums, v[1] * sums])
    cotangent = u_residual if residual is not None else None
    second = module.norm_double_backward(u, cotangent, v, g, x, z, *layer, sums, double_sums)
    return [statistics, out, sums, *first, double_sums, *second]


@pytest.mark.parametrize(
    ("shape", "dtype"), [*((s, torch.float32) for s in SHAPES), (SHAPES[2], torch.float64)], ids=str
)
def test_passes(shape, dtype):
    generator = torch.Generator().manual_seed(len(shape))
    five = [torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(5)]
    v, affine = (torch.randn(2, shape[1], generator=generator, dtype=torch.float64) for _ in range(2))
    for relu, residual, full in COMBINATIONS:
        for x, r, g, u, u_r in layouts(*five):
            given = [x, r if residual else None, g, u, u_r]
            rest = [v if full else None, *(affine if full else (None, None)), relu, not full]

            def cast(to, given=given, rest=rest):
                tensors = [None if t is None else t.to(dtype).to(to).to(DEVICE) for t in given]
                own = [None if t is None else t.to(dtype).to(to).to(DEVICE) for t in rest[1:3]]
                return [*tensors, None if rest[0] is None else rest[0].to(DEVICE), *own, *rest[3:]]

            exact = passes(reference, *cast(torch.float64))
            plain, got = passes(reference, *cast(dtype)), passes(kernels, *cast(dtype))
            for one, rough, good in zip(got, plain, exact, strict=True):
                assert one.shape == rough.shape
                assert one.dtype == rough.dtype
                error, allowed = (one.double() - good).norm(), (rough.double() - good).norm()
                assert error <= 2 * allowed + 16 * torch.finfo(dtype).eps * good.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_small_ones(dtype):
    double_sums, sums, statistics = (torch.rand(n, 70, dtype=torch.float64, device=DEVICE) / 2 for n in (3, 2, 4))
    weight = torch.randn(70, dtype=dtype, device=DEVICE)
    got, exact = (m.norm_weight_cotangent(double_sums, sums, statistics, weight) for m in (kernels, reference))
    torch.testing.assert_close(got, exact)
    for tracked in (torch.tensor(4, device=DEVICE), None):
        rows = [[torch.ones(70, dtype=dtype, device=DEVICE) * k for k in (1, 2)] for _ in range(2)]
        counts = [None if tracked is None else tracked.clone() for _ in range(2)]
        for module, running, count in zip((kernels, reference), rows, counts, strict=True):
            module.norm_track_(*running, count, statistics, 0.3)
        torch.testing.assert_close(*rows)
        assert tracked is None or counts[0] == counts[1] == 5


@pytest.mark.parametrize("shape", [(5, 3, 3, 3), (2, 130, 1, 1), (3, 16, 2, 5)])
def test_layouts(shape):
    plain = torch.randn(shape, device=DEVICE)
    last = layouts_kernels.relayout(plain, torch.float16, True)
    assert last.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(last, plain.half())
    back = layouts_kernels.relayout(last, torch.float32, False)
    assert back.is_contiguous()
    assert torch.equal(back, plain.half().float())


def test_they_compile_without_spills():
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, Path(__file__).with_name("aot_second_order.py")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert {row["arch"] for row in rows} == {80, 90, 100}
    assert {row["pass"] for row in rows} == {"moments", "forward", "backward", "double", "layout"}
    assert not [row for row in rows if row["stack"] or row["registers"] > 128]
