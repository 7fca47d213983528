"""The C++ backend's own ways: instruction sets, threads, sizes at which it goes by others."""

import math
import sys
from pathlib import Path

import pytest
import torch
from test_repulsion import lengthscale, relative, usable

import forde_fast as ff
from forde_fast import reference
from forde_fast.rule import kernel_rule
from forde_fast.testing import LENGTHSCALES, compare, make_lengthscale, make_particles, make_pca

F32, F64, BF16 = torch.float32, torch.float64, torch.bfloat16
operation = sys.modules["forde_fast.repulsion"]  # the module; its function has the same name


def with_threads(particles, counts):
    usable("cpp")
    results = []
    for threads in counts:
        torch.set_num_threads(threads)
        results.append(ff.repulsion(particles, backend="cpp"))
    return results


def test_threads_change_nothing(threads_come_back):
    """Sums run in an order of their own, whatever the number of threads."""
    one, *others = with_threads(torch.randn(5, 32, 300), (1, 2, 3))
    for result in others:
        assert all(torch.equal(part, same) for part, same in zip(result, one, strict=True))


def test_threads_that_split_columns_change_roundings(threads_come_back):
    """Few samples of many columns: in as many pieces as the threads want, whose sums are added up in double."""
    one, *others = with_threads(torch.randn(3, 1, 40_000), (1, 2, 3))
    for result in others:
        for part, same in zip(result, one, strict=True):
            assert relative(part, same.double()) <= 4 * torch.finfo(F32).eps


def test_every_instruction_set(capability):
    """Blocks of pairs and rows with every remainder, the end of a tile, all lengthscales and types."""
    for shape in ((2, 2, 300), (6, 3, 517), (9, 1, 300), (11, 2, 264)):
        for kind in ("identity", "pca", "low rank"):
            for dtype in (F32, BF16):
                for case in ("random", "close pair 1e-2", "duplicate"):
                    for what, errors in compare("cpp", case, shape, dtype, lengthscale(kind, shape[2])).items():
                        assert errors.within, f"{what} of {case} at {shape} in {dtype}: {errors}"


def test_results_larger_than_the_caches(capability):
    """Rows that begin at a line of a cache or do not, few or many of them, of a result of more than 4 MB.

    With all samples eight times over each has a sixty-fourth of the gradient that it has once, which is not so large.
    """
    for shape in ((6, 6, 4096), (7, 5, 4099), (13, 6, 2065)):
        assert 4 * math.prod(shape) < 1 << 22 < 8 * 4 * math.prod(shape)
        for case in ("random", "close pair 1e-2"):
            particles = make_particles(case, shape, 0, F32)
            once = ff.repulsion(particles, backend="cpp").gradient
            often = ff.repulsion(particles.repeat(1, 8, 1), backend="cpp").gradient.unflatten(1, (8, -1))
            error = (64 * often - once[:, None]).abs().max() / once.abs().max()
            assert error <= 8 * torch.finfo(F32).eps, (case, shape)


@pytest.mark.parametrize("normalize", [True, False])
def test_few_samples_of_which_one_is_close(normalize, capability):
    """Columns are split; the far sample takes products of rows, the other one differences."""
    for shape in ((5, 2, 40_000), (13, 3, 20_003)):
        particles = torch.randn(shape, dtype=F64)
        particles[1, 0] = particles[0, 0] + 1e-3 * particles[1, 0]
        result = ff.repulsion(particles, normalize=normalize, backend="cpp")
        for part, same in zip(result, reference.repulsion(particles, normalize=normalize), strict=True):
            assert torch.allclose(part, same, rtol=1e-10, atol=1e-12 * same.abs().max())


def test_pairs_with_others_on_every_instruction_set(capability):
    for moving, repelling in ((1, 5), (4, 3), (5, 8), (7, 1)):
        particles, others = torch.randn(moving, 3, 77, dtype=F64), torch.randn(repelling, 3, 77, dtype=F64)
        for kind in ("identity", "pca", "low rank"):
            exact = reference.repulsion(particles, lengthscale(kind, 77), others)
            result = ff.repulsion(particles, lengthscale(kind, 77), others=others, backend="cpp")
            for part, same in zip(result, exact, strict=True):
                assert torch.allclose(part, same, rtol=1e-10, atol=1e-14)


def in_stages(particles, scale, normalize):
    d, state = ff.distances(particles, scale, normalize=normalize, backend="cpp")
    value, c, h = kernel_rule(d)
    return value, ff.combine(state, c), h, d


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("kind", [*LENGTHSCALES, "without tail"])
def test_two_passes_are_the_stages(kind, normalize, capability):
    """Samples that fill the threads' turns or not, one sample, columns split over threads, ends of tiles."""
    for shape in ((2, 1, 9), (3, 40, 7), (10, 3, 260), (5, 17, 30), (1, 4, 12), (33, 2, 12), (2, 1, 40_000)):
        if shape[2] > 1000 and kind != "identity":
            continue
        size = shape[2]
        scale = make_pca(size, 1 + size // 4) if kind == "without tail" else make_lengthscale(kind, size)
        particles = torch.randn(shape, dtype=F64)
        result = ff.repulsion(particles, scale, normalize=normalize, backend="cpp")
        for part, same in zip(result, in_stages(particles, scale, normalize), strict=True):
            assert torch.allclose(part, same, rtol=1e-9, atol=1e-13)


@pytest.mark.parametrize("kind", LENGTHSCALES)
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_few_columns_are_computed_in_float64(kind, dtype, capability):
    particles, scale = torch.randn(5, 9, 50).to(dtype), make_lengthscale(kind, 50)
    result = ff.repulsion(particles, scale, backend="cpp")
    exact = ff.repulsion(particles.double(), scale, backend="cpp")
    for part, wide in zip(result, exact, strict=True):
        assert torch.equal(part, wide.to(part.dtype))


def test_rows_along_one_axis_differ_by_nothing(capability):
    """s = 1 or -1 whatever the length: a rounding of it would be divided by h = 1e-12."""
    particles = torch.zeros(7, 3, 300)
    particles[..., 4] = torch.rand(7, 3) * torch.tensor([1e-6, 1.0, 1e6]) + 1e-7
    for kind in ("identity", "pca", "low rank"):
        result = ff.repulsion(particles, lengthscale(kind, 300), backend="cpp")
        if kind == "identity":
            assert (result.distances == 0).all()
        assert (result.gradient == 0).all(), kind


@pytest.mark.parametrize(("scale", "eps"), [(1e-22, 1e-30), (1e-20, 1e-36), (1e-17, 1e-24), (1e14, 1e-24)])
def test_rows_whose_products_leave_the_range_of_float(scale, eps, capability):
    """Far apart as they are, they go by differences of normalised rows."""
    for groups in (2, 40):  # columns split, and not
        particles = torch.randn(3, groups, 5000 if groups == 2 else 300) * scale
        exact = reference.repulsion(particles.double(), eps=eps)
        found = ff.repulsion(particles, eps=eps, backend="cpp")
        for part, wanted in zip(found, exact, strict=True):
            assert torch.allclose(part.double(), wanted, rtol=1e-4, atol=float(wanted.abs().max()) * 1e-5)


@pytest.mark.parametrize("shape", [(3, 0, 5), (0, 2, 5), (3, 2, 0)])
def test_the_operations_refuse_empty_tensors(shape):
    usable("cpp")
    with pytest.raises(RuntimeError, match="all > 0"):
        torch.ops.forde_fast.pair_distances(torch.randn(shape), None, None, True, 1e-24)
    with pytest.raises(RuntimeError, match="all > 0"):
        torch.ops.forde_fast.median_rule(torch.randn(shape), None, 1.0)


def test_kernel_values_of_far_particles_vanish(capability):
    d = torch.rand(6, 6, 20, dtype=F64) * 10.0 ** torch.arange(-20, 0) + 1e-30
    d[:, :, ::2] *= torch.logspace(0, 4, 6, dtype=F64)[:, None, None]
    d[range(6), range(6)] = 0
    value, c, h, _ = torch.ops.forde_fast.median_rule(d, None, math.log(6))
    for part, exact in zip((value, c, h), kernel_rule(d), strict=True):
        assert torch.allclose(part, exact, rtol=1e-14, atol=1e-300)
    assert (c == 0).sum() > 6 * 20


def test_columns_that_are_computed_in_float64_are_as_many_as_in_cpp():
    text = (Path(__file__).parents[1] / "csrc/cpu/rows.h").read_text()
    assert f"kExactColumns = {operation.EXACT_COLUMNS};" in text
