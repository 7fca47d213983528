"""The CUDA C++ kernel for a basis of low rank against the float64 oracle: on the host by low_rank_on_host.cpp, and on
a GPU where there is one.

On the host every case runs twice, with the threads in opposite orders, copies as late and as early as they may be,
products likewise: results that differ by a bit are an error.
"""

import ctypes
import math
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from test_precision import rounded_product

import forde_fast as ff
from forde_fast import reference
from forde_fast.testing import CASES, compare, make_particles, make_pca
from forde_fast.types import Repulsion

F32 = torch.float32
operation = sys.modules["forde_fast.repulsion"]  # the module; its function has the same name
HEADER = Path(__file__).parents[1] / "csrc/cuda/low_rank.h"
gpu = pytest.mark.skipif(not ff.available_backends()["cuda"], reason=ff.available_backends()["cuda"].reason or "")


class LowRank(ctypes.Structure):  # csrc/cuda/low_rank.h
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("particles", "factor", "gradient", "value", "bandwidth")),
        *((name, ctypes.c_void_p) for name in ("distances", "workspace")),
        *((name, ctypes.c_int64) for name in ("groups", "columns", "stride_m", "stride_g")),
        *((name, ctypes.c_int) for name in ("members", "rank")),
        *((name, ctypes.c_double) for name in ("unit", "tail", "eps", "log_count")),
    )


class Host:
    """fused_low_rank on CPU tensors, as on a chip of so many processors."""

    def __init__(self, library):
        self.run, self.processors = library.low_rank_on_host, 3
        self.plans = set()  # (blocks, splits, items) that came up
        self.twice = []  # whether all went down again with exact norms

    def fused_low_rank(self, particles, factor, unit, tail, eps, log_count):
        members, groups, columns = particles.shape
        assert (particles.stride(2), factor.is_contiguous(), factor.dtype) == (1, True, torch.float16)
        assert factor.shape[0] == 16 * math.ceil(columns / 128)
        results = []
        for backwards in (False, True):
            sizes = (), (members, groups), (members, members, groups), particles.shape
            value, h, d, gradient = (torch.full(size, math.nan) for size in sizes)
            pointers = [x.data_ptr() for x in (particles, factor, gradient, value, h, d)]
            numbers = groups, columns, particles.stride(0), particles.stride(1), members, 8 * factor.shape[1]
            plan = (ctypes.c_int * 4)()
            call = LowRank(*pointers, None, *numbers, unit, tail, eps, log_count)
            assert self.run(call, self.processors, backwards, plan), "threads wait for each other"
            self.plans.add(tuple(plan[:3]))
            self.twice.append(bool(plan[3]))
            results.append((value, gradient, h, d))
        for one, other in zip(*results, strict=True):
            assert torch.equal(one.nan_to_num(), other.nan_to_num()), "the order of threads matters"
        return results[0]


@pytest.fixture(scope="module")
def library(compiled_on_host):
    loaded = compiled_on_host("low_rank")
    loaded.low_rank_on_host.argtypes = [LowRank, ctypes.c_int, ctypes.c_bool, ctypes.c_void_p]
    loaded.low_rank_on_host.restype = ctypes.c_bool
    return loaded


@pytest.fixture
def host(library, monkeypatch):
    """backend="cuda" runs on the host, where "tf32" means something."""
    host, choose = Host(library), operation._choose
    monkeypatch.setattr(operation, "_choose", lambda name, *a: ("cuda", host) if name == "cuda" else choose(name, *a))
    monkeypatch.setattr(operation, "_rounds", lambda device: True)
    return host


def errors(x, exact, particles):
    """Of value, bandwidth, distances and gradient, relative; of the gradient each row by its particle's norm."""
    norm = (particles.double().square().sum(-1, keepdim=True) + 1e-24).sqrt()
    pairs = [(getattr(x, what), getattr(exact, what)) for what in ("value", "bandwidth", "distances")]
    pairs.append((x.gradient * norm, exact.gradient * norm))
    return torch.tensor([float((a.double() - b).norm() / b.norm()) for a, b in pairs])


def in_tf32(particles, scale):
    """What products in tf32 leave of the rows as they are, emulated: plain PyTorch's on a GPU."""
    factor, tail = scale.factors(F32, particles.device)
    norm = particles.norm(dim=-1, keepdim=True)
    s = particles / norm
    x = rounded_product(s, factor, "tf32")
    difference, apart = x[:, None] - x[None], s[:, None] - s[None]
    d = difference.square().sum(-1) + tail * apart.square().sum(-1)
    h = reference.bandwidth_of(d)
    c = reference.weights(d, h) / h * (-2 / d.shape[2])
    mixed = rounded_product((c[..., None] * difference).sum(1), factor.T, "tf32")
    v = mixed + tail * (c[..., None] * apart).sum(1)
    gradient = (v - (v * s).sum(-1, keepdim=True) * s) / norm
    return Repulsion(reference.value(d, h), gradient, h[0], d)


# one number's error, the value's, is luck, and d's of a few samples nearly
SLACK = torch.tensor([4e-5, 1e-4, 1e-4, 8 * torch.finfo(F32).eps])


def within(scale, *draws):
    """Whether value, bandwidth, distances and gradient have at most twice the error of tf32, over all (result,
    particles)."""
    own, plain = torch.zeros(4), torch.zeros(4)
    for result, particles in draws:
        exact = reference.repulsion(particles.double(), scale)
        own += errors(result, exact, particles).square() / len(draws)
        plain += errors(in_tf32(particles, scale), exact, particles).square() / len(draws)
    print(own.sqrt(), plain.sqrt())
    return bool((own.sqrt() <= 2 * plain.sqrt() + SLACK).all())


SHAPES = [
    (2, 5, 260, 20),
    (4, 9, 304, 130),
    (8, 6, 516, 60),
    (10, 3, 388, 40),
]  # of an odd M two clusters' value is luck


@pytest.mark.parametrize("case", ["random", "spread 1e-1", "spread 1e-3", "two clusters", "close pair 1e-2"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_within_twice_the_error_of_tf32(shape, case, host):
    scale, draws = (
        make_pca(shape[2], shape[3], 0.01),
        [make_particles(case, shape[:3], seed, F32) for seed in range(3)],
    )
    assert within(scale, *[(ff.repulsion(particles, scale, backend="cuda"), particles) for particles in draws])


@pytest.mark.parametrize("case", ["random", "spread 1e-1", "close pair 1e-2"])
def test_distances_that_are_the_tail_s(case, host):
    """Plain PyTorch does not round those: by products of rows in float16 they were 2.6 times as far off."""
    scale, shape = make_pca(516, 60, 30.0), (8, 6, 516)
    draws = [make_particles(case, shape, seed, F32) for seed in range(3)]
    assert within(scale, *[(ff.repulsion(particles, scale, backend="cuda"), particles) for particles in draws])


def sampled(columns):
    """The columns that provisional norms are found from."""
    quarter, places = columns // 16 * 4, columns // 16384 + 1
    starts = (n * quarter + place * (quarter // places // 4 * 4) for n in range(4) for place in range(places))
    return [start + k for start in starts for k in range(32)]


def test_norms_that_a_few_columns_mislead_about(host):
    """Rows that are 0, or larger, or like nothing else where provisional norms look: found again with exact ones."""
    scale, some = make_pca(600, 60, 0.01), sampled(600)
    far = torch.randn(10, 2, 600)
    near = (torch.randn(1, 2, 600) + 1e-3 * torch.randn(10, 2, 600)) * (torch.rand(10, 1, 1) + 0.5)
    cases = {"as they are": far, "near": near, "large": 1e15 * far, "small": 1e-15 * far}
    for name, rows in (("far", far), ("near", near)):
        for what, factor in (("nothing there", 0.0), ("little there", 0.2), ("much there", 100.0)):
            cases[f"{name}, {what}"] = rows.clone()
            cases[f"{name}, {what}"][..., some] *= factor
            cases[f"{name}, {what} in one row"] = rows.clone()
            cases[f"{name}, {what} in one row"][4][..., some] *= factor
        cases[f"{name}, unlike there"] = rows.clone()
        cases[f"{name}, unlike there"][..., some] = torch.randn(10, 2, len(some))
    for name, rows in cases.items():
        assert within(scale, (ff.repulsion(rows, scale, backend="cuda"), rows)), name
    assert any(host.twice)


def test_norms_whose_differences_are_most_of_a_distance(host):
    """Rows nearly along one direction whose norms a few columns say differently, none of them far off: 0.2 and 0.4 of
    what they are. Only what a pair's distance would be found from shows it."""
    scale, columns, draws = make_pca(1024, 60, 0.01), sampled(1024), []
    for seed in range(3):
        draw = torch.Generator().manual_seed(seed)
        rows = torch.randn(1, 1, 1024, generator=draw) + 1e-3 * torch.randn(4, 1, 1024, generator=draw)
        rows[..., columns] *= 0.2
        ff.repulsion(rows, scale, backend="cuda")
        assert not any(host.twice)
        rows[::2, :, columns] *= 2
        draws.append((ff.repulsion(rows, scale, backend="cuda"), rows))
        share = rows[..., columns].square().mean(-1).sqrt() / rows.square().mean(-1).sqrt()
        assert 1 / 8 < share.min() < share.max() < 4
        assert all(host.twice[-2:])
        host.twice.clear()
    assert within(scale, *draws)


@pytest.mark.parametrize("border", [4, 8, 12])
def test_norms_of_images_are_found_once(border, host):
    """Gradients of images whose borders matter little, and of which every second member sees one half."""
    scale, draws = make_pca(3 * 32 * 32, 40, 0.01), []
    for seed in range(4):
        rows = torch.randn(10, 1, 3, 32, 32, generator=torch.Generator().manual_seed(seed))
        rows[..., :border] *= 0.02
        rows[..., -border:] *= 0.02
        rows[::2, ..., :16, :] *= 0.1
        rows = rows.flatten(2)
        draws.append((ff.repulsion(rows, scale, backend="cuda"), rows))
    assert within(scale, *draws)
    rows[3] = 0
    assert all(bool(x.isfinite().all()) for x in ff.repulsion(rows, scale, backend="cuda"))
    assert not any(host.twice)


def test_norms_from_more_places(host):
    """Of very many columns, two places of each quarter; by those a row is 16 times as long as it is, which shows."""
    scale, rows = make_pca(16_384, 20, 0.01), torch.randn(2, 1, 16_384)
    few = torch.zeros(16_384, dtype=torch.bool).index_fill(0, torch.tensor(sampled(16_384)), True)
    rows[1, 0, ~few] *= 1 / 16
    assert within(scale, (ff.repulsion(rows, scale, backend="cuda"), rows))
    assert all(host.twice)


def test_what_float16_and_float32_end_at(host):
    """One large column, as long as provisional norms let a row be; a row so far that its weights are subnormal."""
    scale = make_pca(512, 40, 0.01)
    assert not set(range(40, 120)) & set(sampled(512))
    for size in (80.0, 170.0, 190.0):
        draws, draw = [], torch.Generator().manual_seed(0)
        for column in range(40, 120, 10):  # how one column is rounded is luck
            rows = torch.randn(2, 2, 512, generator=draw)
            rows[:, :, column] = torch.tensor([-size, size])[:, None] * (1 + 0.01 * torch.rand(2, 2, generator=draw))
            draws.append((ff.repulsion(rows, scale, backend="cuda"), rows))
        assert within(scale, *draws), size
    for noise in torch.linspace(0.14, 0.17, 7):
        draw = torch.Generator().manual_seed(1)
        rows = torch.randn(1, 1, 512, generator=draw) + noise * torch.randn(10, 1, 512, generator=draw)
        rows[9] = torch.randn(1, 512, generator=draw)
        assert all(bool(x.isfinite().all()) for x in ff.repulsion(rows, scale, backend="cuda")), noise


def test_degenerate_rows(host):
    scale = make_pca(300, 40, 0.01)
    for case in CASES:
        result = ff.repulsion(make_particles(case, (5, 2, 300), 0, F32), scale, backend="cuda")
        assert all(bool(x.isfinite().all()) for x in result), case
    equal = torch.randn(6, 3, 300)
    equal[4], equal[5] = equal[1], equal[0]
    result = ff.repulsion(equal, scale, backend="cuda")
    assert not result.distances[1, 4].any()
    assert not result.distances[0, 5].any()
    assert int((result.distances == 0).sum()) == (6 + 4) * 3
    same = ff.repulsion(equal[:1].expand(4, 3, 300), scale, backend="cuda")
    assert not same.distances.any()
    assert not same.gradient.any()
    zeros = ff.repulsion(torch.zeros(4, 3, 300), scale, backend="cuda")
    assert not zeros.distances.any()
    assert not zeros.gradient.any()
    for bad in (math.nan, math.inf, 1e25):
        rows = torch.randn(4, 3, 300)
        rows[1, 1, 5] = bad
        with pytest.raises(ValueError, match=r"^particles: expected "):  # for the value says so
            ff.repulsion(rows, scale, backend="cuda")


PLANS = {  # processors, samples, columns -> blocks, splits, items
    (1, 20, 260): (1, 1, 3),  # groups of samples one after another
    (3, 8, 260): (3, 3, 3),  # one group, its columns in three pieces
    (4, 16, 1000): (4, 2, 4),
    (2, 3, 260): (2, 2, 2),
    (10, 8, 260): (8, 5, 5),  # blocks that have a sample's rule, but no columns
    (4, 2, 260): (4, 3, 3),  # one that has neither, and finds the value
    (20, 3, 1280): (20, 20, 20),  # sums that come in three rounds
}


@pytest.mark.parametrize(("chip", "expected"), PLANS.items(), ids=str)
@pytest.mark.parametrize("rank", [30, 130])
def test_every_plan(rank, chip, expected, host):
    """The same sums, in whatever pieces; of rows that are padded too, and of such as are gone down with twice."""
    host.processors, groups, columns = chip
    scale, particles = make_pca(columns, rank, 0.01), torch.randn(4, groups, columns)
    padded = torch.full((4, groups + 1, columns + 8), math.nan)[:, 1:, 8:]
    misleading = particles.clone()
    misleading[1][..., sampled(columns)] = 0
    for rows in (particles, padded.copy_(particles), misleading):
        exact = particles if rows is padded else rows
        assert within(scale, (ff.repulsion(rows, scale, backend="cuda"), exact))
    assert host.plans == {expected}
    assert any(host.twice)
    assert not all(host.twice)


def test_what_it_is_for(monkeypatch):
    """_half_factor says None where the kernel cannot do it, and then others do."""
    monkeypatch.setattr(operation, "_rounds", lambda device: True)
    rows, scale = torch.randn(10, 2, 512), make_pca(512, 60, 0.01)
    factor, unit, tail = operation._half_factor(rows, scale, True, "tf32")
    assert (factor.shape, factor.dtype, tail) == ((64, 16, 8, 8), torch.float16, 0.01)
    plain = factor.transpose(1, 2).reshape(512, 128).double() * unit
    exact = scale.factors(torch.float64, rows.device)[0]
    assert not plain[:, 60:].any()
    torch.testing.assert_close(plain[:, :60], exact, rtol=2**-11, atol=0)
    for other in (
        (torch.randn(11, 2, 512), scale, True, "tf32"),
        (torch.randn(1, 2, 512), scale, True, "tf32"),
        (torch.randn(3, 2, 510), make_pca(510, 60, 0.01), True, "tf32"),
        (torch.randn(3, 2, 256), make_pca(256, 60, 0.01), True, "tf32"),  # computed in float64
        (rows.bfloat16(), scale, True, "tf32"),
        (rows, scale, False, "tf32"),
        (rows, scale, True, "ieee"),
        (rows, make_pca(512, None, 0.01), True, "tf32"),
        (rows, None, True, "tf32"),
    ):
        assert operation._half_factor(*other) is None


@pytest.mark.parametrize("compiled", [True, False])
def test_hopper_without_the_kernel_does_not_run_it(compiled, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(operation.operators, "HAS_LOW_RANK", compiled)
    assert operation._is_hopper(SimpleNamespace(is_cuda=True, device="cuda")) is compiled


def test_sizes_are_those_of_the_header():
    text = HEADER.read_text()
    assert f"kLowRankMembers = {operation.LOW_RANK_MEMBERS};" in text
    assert f"in float16, K = 128 or {operation.LOW_RANK}:" in text


@gpu
@pytest.mark.parametrize("shape", [*SHAPES, (10, 128, 3072, 256), (10, 300, 520, 40)], ids=str)
def test_gpu_within_the_budget_of_errors(shape):
    """Of the value, one number of a draw, a few draws say little: by 16 it is as plain PyTorch's."""
    scale, few = make_pca(shape[2], shape[3], 0.01), shape[1] < 20
    for case in CASES if few else ("random", "duplicate"):
        found = compare("cuda", case, shape[:3], F32, scale, 16 if few else 6, "cuda", precision="tf32")
        for what, errors in found.items():
            assert errors.within, f"{what} of {case}: {errors}"


@gpu
@pytest.mark.parametrize("rank", [60, 130])
def test_gpu_misleading_columns_and_graph(rank):
    scale, rows = make_pca(1000, rank, 0.01), torch.randn(10, 40, 1000, device="cuda")
    misleading = rows.clone()
    misleading[3][..., sampled(1000)] = 0
    for particles in (rows, misleading):
        graph = torch.cuda.CUDAGraph()
        ff.repulsion(particles, scale)
        with torch.cuda.graph(graph):
            result = ff.repulsion(particles, scale)  # "auto" is this kernel
        graph.replay()
        once = [x.clone() for x in result]
        graph.replay()
        assert all(torch.equal(a, b) for a, b in zip(once, result, strict=True))
        cpu = Repulsion(*(x.cpu() for x in result))
        assert within(scale, (cpu, particles.cpu()))
