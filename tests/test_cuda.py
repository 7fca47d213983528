"""The CUDA C++ kernel against the float64 oracle: on the host by fused_on_host.cpp, and on a GPU where there is one.

On the host every case runs twice, with the threads in opposite orders: results that differ by a bit are an error.
"""

import ctypes
import itertools
import math
import sys

import pytest
import torch

import forde_fast as ff
from forde_fast import reference
from forde_fast.testing import CASES, budget, compare, make_particles, make_pca

F32, F64, BF16 = torch.float32, torch.float64, torch.bfloat16
INPUTS = {F32: 0, BF16: 1, F64: 2}  # enum Input in csrc/repulsion.h
operation = sys.modules["forde_fast.repulsion"]  # the module; its function has the same name
gpu = pytest.mark.skipif(not ff.available_backends()["cuda"], reason=ff.available_backends()["cuda"].reason or "")


class Fused(ctypes.Structure):  # csrc/cuda/fused.h
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("particles", "product", "gradient", "value", "bandwidth")),
        *((name, ctypes.c_void_p) for name in ("distances", "workspace")),
        *((name, ctypes.c_int64) for name in ("groups", "columns", "stride_m", "stride_g")),
        *(("members", ctypes.c_int), ("input", ctypes.c_int), ("normalize", ctypes.c_bool)),
        *((name, ctypes.c_double) for name in ("eps", "log_count")),
    )


class Host:
    """The operations of the cuda backend on CPU tensors, as on a chip of so many processors and so much memory."""

    contrasts = staticmethod(torch.ops.forde_fast.contrasts)

    def __init__(self, library):
        self.run, self.processors, self.shared = library.fused_on_host, 3, 1 << 17
        self.plans = set()  # (splits, chunks of an item, slots) that came up

    def fused(self, particles, product, normalize, eps, log_count):
        members, groups, columns = particles.shape
        assert particles.stride(2) == 1
        wide = F64 if particles.dtype == F64 else F32
        results = []
        for backwards in (False, True):
            value, h, d = (torch.empty(s, dtype=wide) for s in ((), (members, groups), (members, members, groups)))
            gradient = torch.empty(particles.shape, dtype=particles.dtype)
            tensors = particles, product, gradient, value, h, d
            pointers = [None if x is None else x.data_ptr() for x in tensors]
            sizes = groups, columns, particles.stride(0), particles.stride(1), members, INPUTS[particles.dtype]
            call = Fused(*pointers, None, *sizes, normalize, eps, log_count)
            plan = (ctypes.c_int * 5)()
            ended = self.run(call, self.processors, self.shared, backwards, plan)
            assert ended, "threads wait for each other"
            results.append((value, gradient, h, d))
            self.plans.add(tuple(plan[1:4]))
        for one, other in zip(*results, strict=True):
            assert torch.equal(one.nan_to_num(), other.nan_to_num()), "the order of threads matters"
        return results[0]


@pytest.fixture(scope="module")
def library(compiled_on_host):
    loaded = compiled_on_host("fused")
    loaded.fused_on_host.argtypes = [Fused, ctypes.c_int, ctypes.c_int64, ctypes.c_bool, ctypes.c_void_p]
    loaded.fused_on_host.restype = ctypes.c_bool
    loaded.plan_of_chip.argtypes = [Fused, ctypes.c_int, ctypes.c_int64, ctypes.c_void_p]
    loaded.plan_of_chip.restype = None
    return loaded


@pytest.fixture
def host(library, monkeypatch):
    """backend="cuda" runs on the host."""
    if not ff.available_backends()["cpp"]:
        pytest.skip("waits for the cpp backend, whose contrasts these are")
    host = Host(library)
    monkeypatch.setattr(operation, "_choose", lambda backend, *_: ("cuda", host))
    monkeypatch.setitem(operation.operators.UNUSABLE, "triton", "")
    return host


def relative(x, exact):
    return float((x.double() - exact).norm() / exact.norm())


# M: a pair, odd, the paper's, just beyond the kernel of ten rows, its most. D: odd, a vector's multiple, float32.
SHAPES = [(2, 3, 7), (3, 4, 301), (10, 2, 304), (11, 1, 270), (16, 2, 300)]
KINDS = {"identity": lambda size: None, "pca": make_pca, "low rank": lambda size: make_pca(size, 1 + size // 4, 0.01)}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_within_the_budget_of_errors(shape, kind, host):
    for case in CASES if shape[0] == 3 and kind != "low rank" else ("random", "close pair 1e-4", "dead row"):
        for dtype in (F32, BF16, F64) if case == "random" else (F32,):
            for what, errors in compare("cuda", case, shape, dtype, KINDS[kind](shape[2])).items():
                assert errors.within, f"{what} of {case} in {dtype}: {errors}"


def test_every_number_of_particles(host):
    for members, kind, normalize in itertools.product(range(1, 17), ("identity", "pca"), (True, False)):
        particles, scale = torch.randn(members, 2, 21, dtype=F64), KINDS[kind](21)
        exact = reference.repulsion(particles, scale, normalize=normalize)
        result = ff.repulsion(particles, scale, normalize=normalize, backend="cuda")
        for part, same in zip(result, exact, strict=True):
            assert part.shape == same.shape
            assert torch.allclose(part, same, rtol=1e-10, atol=1e-13)


PLANS = [  # multiprocessors, bytes for rows, samples, columns -> (splits, chunks, slots)
    (4, 1 << 17, 3, 1500, (1, 1, 1)),  # a block for each sample
    (4, 1 << 17, 13, 300, (1, 1, 4)),  # four samples stay with a block
    (2, 1 << 13, 9, 300, (1, 1, 2)),  # two of five stay
    (2, 1 << 11, 5, 300, (1, 3, 1)),  # a sample passes in pieces
    (4, 1 << 17, 1, 3000, (3, 1, 1)),  # the blocks share a sample
    (5, 1 << 13, 2, 2500, (2, 2, 1)),  # and take it in pieces
]


@pytest.mark.parametrize(("processors", "shared", "groups", "columns", "expected"), PLANS)
@pytest.mark.parametrize("dtype", [F32, BF16, F64], ids=str)
def test_every_plan(processors, shared, groups, columns, expected, dtype, host):
    """The same sums, in whatever pieces: rows of unaligned and of padded samples too."""
    host.processors, host.shared = processors, shared * dtype.itemsize // 4
    particles = make_particles("duplicate", (3, groups, columns), 0).to(dtype)
    exact = reference.repulsion(particles.double())
    padded = torch.full((3, groups + 1, columns + 8), math.nan, dtype=dtype)[:, 1:, 8:]
    odd = torch.full((3, groups, columns + 1), math.nan, dtype=dtype)[..., 1:]
    for rows in (particles, padded.copy_(particles), odd.copy_(particles)):
        result = ff.repulsion(rows, backend="cuda")
        for part, same in zip(result, exact, strict=True):
            assert relative(part, same) < (4e-3 if part.dtype == BF16 else 1e-5 if part.dtype == F32 else 1e-10)
        assert not result.distances[2, 1].any()
    assert host.plans == {expected}


@pytest.mark.parametrize("dtype", [F32, BF16, F64], ids=str)
def test_plans_of_real_chips(dtype, library):
    """Shared memory suffices; at the published size every row of the particles is read and written once."""
    chips = {"A100": (108, 166_912), "H200": (132, 232_448), "B200": (148, 232_448)}
    plan = (ctypes.c_int * 5)()
    for processors, memory in chips.values():
        for members, groups, columns in ((2, 1, 1), (10, 128, 192), (16, 4096, 3072), (10, 1, 11_173_962)):
            call = Fused(groups=groups, columns=columns, members=members, input=INPUTS[dtype])
            library.plan_of_chip(call, processors, memory, plan)
            assert min(plan) > 0
            assert plan[0] <= processors
            assert plan[4] <= memory
    if dtype != F64:
        call = Fused(groups=128, columns=3072, members=10, input=INPUTS[dtype])
        library.plan_of_chip(call, 132, 232_448, plan)
        assert plan[:4] == [128, 1, 1, 1]


def test_what_is_not_finite_shows(host):
    for bad in (math.nan, math.inf, 1e25):
        particles = torch.randn(3, 2, 300)
        particles[1, 1, 5] = bad
        with pytest.raises(ValueError, match=r"^particles: expected "):  # for the value says so
            ff.repulsion(particles, backend="cuda")


def test_it_says_what_it_does_not_do(host, monkeypatch):
    particles = torch.randn(3, 2, 5)
    for call, message in (
        (lambda: ff.repulsion(torch.randn(17, 2, 5), backend="cuda"), "at most 16 particles, got 17"),
        (lambda: ff.repulsion(particles, others=particles, backend="cuda"), "repel each other, got others"),
        (lambda: ff.repulsion(particles, bandwidth=0.5, backend="cuda"), "the default bandwidth, got 0.5"),
        (lambda: ff.distances(particles, backend="cuda"), "one with two stages"),
    ):
        with pytest.raises(RuntimeError, match=f"backend: .*{message}"):
            call()
    monkeypatch.setitem(operation.operators.UNUSABLE, "triton", "no Triton")
    with pytest.raises(RuntimeError, match=r"no lengthscale, .* got no Triton"):
        ff.repulsion(particles, make_pca(5), backend="cuda")


def test_shapes_for_tracing(host):
    from torch._subclasses.fake_tensor import FakeTensorMode

    for dtype in (F32, BF16, F64):
        particles = torch.randn(3, 2, 300).to(dtype)
        with FakeTensorMode() as mode:
            traced = torch.ops.forde_fast.fused(mode.from_tensor(particles), None, True, 1e-24, 1.0)
        for part, same in zip(traced, host.fused(particles, None, True, 1e-24, 1.0), strict=True):
            assert (part.shape, part.dtype, part.stride()) == (same.shape, same.dtype, same.stride())


@gpu
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [*SHAPES, (1, 5, 300)], ids=str)
def test_gpu_within_the_budget_of_errors(shape, kind):
    """Products in float32, as plain PyTorch's are on the CPU."""
    for case in CASES:
        for dtype in (F32, BF16, F64):
            scale = KINDS[kind](shape[2])
            for what, errors in compare("cuda", case, shape, dtype, scale, device="cuda", precision="ieee").items():
                assert errors.within, f"{what} of {case} in {dtype}: {errors}"


@gpu
@pytest.mark.parametrize(("members", "groups", "columns"), [(10, 128, 3072), (16, 300, 784), (5, 2, 100_003)])
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_gpu_large(members, groups, columns, dtype):
    """Every multiprocessor at work; the oracle on the GPU too."""
    particles = make_particles("random", (members, groups, columns), 0, dtype).cuda()
    exact, plain = reference.repulsion(particles.double()), reference.repulsion(particles.float())
    result = ff.repulsion(particles, backend="cuda")
    for what in ("value", "gradient", "bandwidth", "distances"):
        good = getattr(exact, what)
        error, allowed = (relative(getattr(x, what), good) for x in (result, plain))
        assert error <= budget(allowed, dtype, rounded=what == "gradient"), what


@gpu
def test_gpu_graph_without_waiting():
    particles = torch.randn(10, 64, 3072, device="cuda")
    expected = ff.repulsion(particles, backend="cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        ff.repulsion(particles, backend="cuda")
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = ff.repulsion(particles, backend="cuda")
    graph.replay()
    for part, same in zip(result, expected, strict=True):
        assert torch.equal(part, same)
    torch.library.opcheck(torch.ops.forde_fast.fused.default, (particles[:3, :2], None, True, 1e-24, 1.0))


@gpu
def test_gpu_stream_and_derivative():
    particles = torch.randn(4, 8, 3072, device="cuda", requires_grad=True)
    with torch.cuda.stream(torch.cuda.Stream()):
        result = ff.repulsion(particles, backend="cuda")
    torch.cuda.synchronize()
    result.value.backward()
    assert torch.equal(particles.grad, result.gradient)
