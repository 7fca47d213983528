"""The operation: every backend against the published code's numbers and against the float64 oracle."""

import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import forde_fast as ff
from forde_fast import reference
from forde_fast.rule import kernel_rule
from forde_fast.testing import CASES, DRAWS, LENGTHSCALES, compare, make_lengthscale, make_particles, make_pca
from forde_fast.validation import NotFinite

GOLDEN = sorted((Path(__file__).parent / "golden").glob("repulsion_*.npz"))
FAST = ["cpp", "triton"]  # "cuda" does the default path only: test_cuda.py
F32, F64, BF16 = torch.float32, torch.float64, torch.bfloat16
operation = sys.modules["forde_fast.repulsion"]  # the module; its function has the same name


def usable(backend):
    found = ff.available_backends()[backend]
    if not found:
        pytest.skip(f"waits for the {backend} backend: {found.reason}")
    return backend


def home(backend):
    """The device of a backend's particles."""
    return "cuda" if torch.cuda.is_available() and backend not in ("reference", "cpp") else "cpu"


@pytest.fixture(params=["reference", *FAST])
def backend(request):
    with torch.device(home(request.param)):
        yield usable(request.param)


@pytest.fixture(params=FAST)
def fast(request):
    with torch.device(home(request.param)):
        yield usable(request.param)


def load(path):
    golden = {name: torch.tensor(array) for name, array in np.load(path, allow_pickle=False).items()}
    pca = ff.PCA(golden["eigenvectors"], golden["eigenvalues"]) if "eigenvectors" in golden else None
    return golden, pca


def relative(x, exact):
    return float((x.double() - exact).norm() / exact.norm())


@pytest.mark.parametrize("path", GOLDEN, ids=lambda p: p.stem)
def test_published_code_in_float64(path, backend):
    golden, pca = load(path)
    particles = golden["input_gradients"]
    result = ff.repulsion(particles, pca, eps=float(golden["eps"]), backend=backend)
    median = (result.bandwidth - 1e-12).mean() * np.log(len(particles))
    assert relative(result.value, golden["value"]) < 1e-10
    assert relative(result.gradient, golden["grad"]) < 1e-10
    assert relative(median, golden["mean_median"]) < 1e-10


@pytest.mark.parametrize("path", GOLDEN, ids=lambda p: p.stem)
def test_published_code_in_float32(path, fast):
    golden, pca = load(path)
    particles, eps = golden["input_gradients"].float(), float(golden["eps"])
    if interpreted(fast) and len(particles) == 10:
        pytest.skip("waits for a GPU: ten seconds in the interpreter, which does them in float64")
    result = ff.repulsion(particles, pca, eps=eps, backend=fast, precision="ieee")
    plain = reference.repulsion(particles, pca, eps=eps)
    for what, exact in (("value", golden["value"]), ("gradient", golden["grad"])):
        allowed = 2 * relative(getattr(plain, what), exact) + 8 * torch.finfo(F32).eps
        assert relative(getattr(result, what), exact) <= allowed


# M: alone, a pair (the median is the mean of two), odd, the paper's, beyond a power of two, many.
# D: odd and below a vector, digits with three channels, beyond what is done in float64, CIFAR.
# G: one sample, odd, a batch.
SHAPES = [
    (1, 5, 192), (2, 1, 7), (2, 5, 300), (3, 128, 7), (10, 5, 192), (10, 5, 300), (17, 5, 300), (64, 1, 300),
    (64, 5, 7), (3, 1, 3072), (10, 2, 3072),
]  # fmt: skip
INTERPRETED = [(2, 1, 300), (3, 2, 7), (10, 1, 300)]  # half a second a call; test_kernels*.py have more
SOME = ("random", "spread 1e-3", "close pair 1e-4", "dead row")


def interpreted(backend):
    return backend == "triton" and not torch.cuda.is_available()


def sizes(backend):
    return INTERPRETED if interpreted(backend) else SHAPES


def lengthscale(kind, size):
    return {"identity": None, "pca": make_pca(size), "low rank": make_pca(size, 1 + size // 4, 0.01)}[kind]


@pytest.mark.parametrize("kind", ["identity", "pca", "low rank"])
@pytest.mark.parametrize(("name", "shape"), [(name, shape) for name in FAST for shape in sizes(name)], ids=str)
def test_fresh_random_cases(name, shape, kind):
    large = interpreted(name) or shape[0] ** 2 * shape[1] * shape[2] > 1e6 or shape[2] > 1000
    draws = 2 if interpreted(name) else DRAWS
    for case in SOME if large else CASES:
        for dtype in (F32,) if interpreted(name) else (F32, BF16) if large else (F32, F64, BF16):
            scale = lengthscale(kind, shape[2])
            for what, errors in compare(
                usable(name), case, shape, dtype, scale, draws, home(name), precision="ieee"
            ).items():
                assert errors.within, f"{what} of {case} in {dtype}: {errors}"


def steep(size, rank, tail):
    """Eigenvalues k^-2: nearly all of d lies along a few directions."""
    basis = torch.linalg.qr(torch.randn(size, size, dtype=F64))[0][:, :rank].contiguous()
    values = torch.arange(1, size + 1, dtype=F64) ** -2
    return ff.PCA(basis, values[:rank], (values[rank] + values[-1]) / 2 if tail else 0)


@pytest.mark.parametrize(("size", "rank", "tail"), [(400, 50, True), (600, 300, False), (1000, 8, True)])
def test_low_rank_of_a_steep_spectrum(size, rank, tail):
    """Twelve draws: the value is one number of a draw, its error that of a few close pairs."""
    scale = steep(size, rank, tail)
    for case in ("random", "spread 1e-3", "two clusters", "close pair 1e-2", "duplicate"):
        for dtype in (F32, BF16):
            for what, errors in compare(usable("cpp"), case, (7, 2, size), dtype, scale, draws=12).items():
                assert errors.within, f"{what} of {case} in {dtype}: {errors}"


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", [F32, F64, BF16], ids=str)
def test_everything_is_finite(case, dtype, backend):
    for shape in ((4, 1, 300),) if interpreted(backend) else ((1, 2, 7), (2, 2, 7), (5, 1, 1), (4, 1, 300)):
        for kind in ("identity", "low rank"):
            particles = make_particles(case, shape, 0, dtype).to(home(backend))
            result = ff.repulsion(particles, lengthscale(kind, shape[2]), backend=backend)
            assert all(torch.isfinite(part).all() for part in result)
            assert result.gradient.dtype == dtype
            assert result.value.dtype == result.bandwidth.dtype == (F64 if dtype == F64 else F32)
            assert result.gradient.shape == shape
            assert result.bandwidth.shape == shape[:2]


def test_nothing_repels_a_single_member_or_its_twin(backend):
    alone = ff.repulsion(torch.randn(1, 4, 9), backend=backend)
    assert alone.value == 0
    assert (alone.gradient == 0).all()
    same = ff.repulsion(torch.randn(1, 4, 9).expand(6, 4, 9), backend=backend)
    assert (same.gradient == 0).all()
    assert (ff.repulsion(torch.zeros(6, 4, 9), backend=backend).gradient == 0).all()


def test_one_dimension_repels_only_without_normalisation(backend):
    particles = torch.tensor([1.0, 2.0, 4.0])[:, None, None]
    assert (ff.repulsion(particles, backend=backend).gradient.abs() < 1e-6).all()
    assert (ff.repulsion(particles, normalize=False, backend=backend).gradient.abs() > 1e-2).any()


@pytest.mark.parametrize("kind", ["identity", "pca", "low rank"])
@pytest.mark.parametrize("normalize", [True, False])
def test_others_of_another_number(kind, normalize, fast):
    samples = 2 if interpreted(fast) else 4
    particles, others = torch.randn(3, samples, 20, dtype=F64), torch.randn(5, samples, 20, dtype=F64)
    scale = lengthscale(kind, 20)
    for pair in ((particles, others), (particles[:1], others), (particles, others[:1])):
        exact = reference.repulsion(pair[0], scale, pair[1], normalize)
        result = ff.repulsion(pair[0], scale, others=pair[1], normalize=normalize, backend=fast)
        for part, same in zip(result, exact, strict=True):
            assert part.shape == same.shape
            assert torch.allclose(part, same, rtol=1e-10, atol=1e-14)


def test_low_rank_in_stages_with_others(fast):
    """Coefficients from elsewhere, against the definition; by the product where a weight is below the tail."""
    particles, others = torch.randn(3, 2, 40, dtype=F64), torch.randn(2, 2, 40, dtype=F64)
    basis = make_pca(40, 6).eigenvectors
    for tail in (0.0, 0.5, 2.0):
        scale = ff.PCA(basis, torch.linspace(3, 1, 6, device="cpu"), tail)
        assert (scale.factors(F64, particles.device) is None) == (tail == 2)
        for normalize in (True, False):
            d, state = ff.distances(particles, scale, others=others, normalize=normalize, backend=fast)
            exact, oracle = reference.distances(particles, scale, others, normalize)
            c = torch.randn_like(d)
            assert relative(d, exact) < 1e-12
            assert relative(ff.combine(state, c), reference.combine(oracle, c)) < 1e-11


@pytest.mark.parametrize("kind", ["identity", "pca"])
def test_others_that_are_the_particles(kind, fast):
    particles = torch.randn(4, 3, 20, dtype=F64)
    own = ff.repulsion(particles, lengthscale(kind, 20), backend=fast)
    given = ff.repulsion(particles, lengthscale(kind, 20), others=particles, backend=fast)
    for part, same in zip(own, given, strict=True):
        assert torch.allclose(part, same, rtol=1e-10, atol=1e-13)


RULES = [
    ff.Median(over="sample"), ff.Median(over="batch"), ff.Median(owner="first", squared=True),
    ff.Median(add_one=True), 0.3, torch.tensor(0.3), torch.rand(6) + 0.1, torch.rand(4, 6) + 0.1,
]  # fmt: skip


@pytest.mark.parametrize("rule", RULES, ids=lambda r: str(getattr(r, "shape", r)))
def test_bandwidth_rules(rule, fast):
    particles = torch.randn(4, 6, 15, dtype=F64)
    rule = rule.to(particles) if isinstance(rule, torch.Tensor) else rule
    exact = reference.repulsion(particles, bandwidth=rule)
    for part, same in zip(ff.repulsion(particles, bandwidth=rule, backend=fast), exact, strict=True):
        assert part.shape == same.shape
        assert torch.allclose(part, same, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_strided_particles(dtype, fast):
    samples = 2 if interpreted(fast) else 4
    contiguous = torch.randn(3, samples, 33).to(dtype)
    wide = torch.randn(3, samples, 66).to(dtype)
    wide[..., ::2] = contiguous
    permuted = contiguous.permute(2, 0, 1).contiguous().permute(1, 2, 0)
    padded = torch.randn(3, samples + 1, 40).to(dtype)
    padded[:, 1:, 3:36] = contiguous
    for scale in (None, make_pca(33)):
        wanted = ff.repulsion(contiguous, scale, backend=fast)
        for strided in (
            wide[..., ::2],
            permuted,
            padded[:, 1:, 3:36],
            contiguous.transpose(0, 1).contiguous().mT.mT.transpose(0, 1),
        ):
            assert not strided.is_contiguous()
            result = ff.repulsion(strided, scale, backend=fast)
            assert all(torch.equal(part, same) for part, same in zip(result, wanted, strict=True))
    expanded = torch.randn(1, samples, 33).to(dtype).expand(3, samples, 33)
    assert (ff.repulsion(expanded, backend=fast).gradient == 0).all()


@pytest.mark.parametrize("kind", ["identity", "pca"])
def test_symmetries(kind, fast):
    samples = 2 if interpreted(fast) else 4
    particles, scale = torch.randn(5, samples, 24, dtype=F64), lengthscale(kind, 24)
    result = ff.repulsion(particles, scale, backend=fast)
    members, samples = torch.randperm(5), torch.randperm(samples)
    permuted = ff.repulsion(particles[members][:, samples], scale, backend=fast)
    assert torch.allclose(permuted.value, result.value, rtol=1e-12)
    assert torch.allclose(permuted.gradient, result.gradient[members][:, samples], rtol=1e-10, atol=1e-15)
    assert torch.allclose(ff.repulsion(7 * particles, scale, backend=fast).value, result.value, rtol=1e-12)
    assert ((result.gradient * particles).sum(-1).abs() < 1e-14).all()
    rotation = torch.linalg.qr(torch.randn(24, 24, dtype=F64))[0]
    turned = scale and ff.PCA(rotation.T @ scale.eigenvectors.to(rotation), scale.eigenvalues.to(rotation))
    rotated = ff.repulsion(particles @ rotation, turned, backend=fast)
    assert torch.allclose(rotated.gradient, result.gradient @ rotation, rtol=1e-9, atol=1e-14)


def test_columns_split_over_threads(fast):
    """One sample and many inputs: weight space."""
    particles = torch.randn(3, 1, 5_000 if interpreted(fast) else 100_003)
    thin = ff.PCA(torch.nn.functional.normalize(torch.randn(particles.shape[2], 1), dim=0), torch.tensor([3.0]), 0.5)
    for scale in (None, thin):
        for normalize in (True, False):
            exact = reference.repulsion(particles.double(), scale, normalize=normalize)
            result = ff.repulsion(particles, scale, normalize=normalize, backend=fast, precision="ieee")
            assert relative(result.value, exact.value) < 1e-5
            assert relative(result.gradient, exact.gradient) < 1e-5


def test_two_stages_are_the_operation(backend):
    particles, scale = torch.randn(4, 3, 12, dtype=F64), make_pca(12)
    whole = ff.repulsion(particles, scale, backend=backend)
    d, state = ff.distances(particles, scale, backend=backend)
    assert torch.allclose(d, whole.distances)
    assert torch.allclose(d, d.transpose(0, 1))
    kernel = torch.exp(-d / whole.bandwidth)
    c = -2 / 3 * kernel / kernel.sum((1, 2), keepdim=True) / whole.bandwidth
    assert torch.allclose(ff.combine(state, c), whole.gradient, rtol=1e-10, atol=1e-14)


def test_user_lengthscale(fast):
    class Diagonal:
        dimension = 12
        weights = torch.arange(1.0, 13.0, dtype=F64)

        def coordinates(self, s):
            return s * self.weights.sqrt()

        def product(self, s):
            return s * self.weights

    particles = torch.randn(4, 3, 12, dtype=F64)
    exact = reference.repulsion(particles, Diagonal())
    assert relative(ff.repulsion(particles, Diagonal(), backend=fast).gradient, exact.gradient) < 1e-10


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


SCALES = {F32: 1e30, F64: 1e160, torch.bfloat16: 1e30}  # whose squares are out of range


@pytest.mark.parametrize("dtype", SCALES, ids=str)
@pytest.mark.parametrize("kind", ["identity", "pca", "low rank"])
def test_overflow_is_found_on_every_way(kind, dtype, backend):
    particles = torch.randn(4, 2, 300).to(dtype) * SCALES[dtype]
    if particles.is_cuda:
        pytest.skip("CUDA tensors are not inspected")
    scale = lengthscale(kind, 300)
    for others, normalize in ((None, True), (None, False), (particles[:1] * 0.5, True), (particles[:1] * 0.5, False)):
        for call in (ff.repulsion, ff.distances):
            with pytest.raises(NotFinite, match=r"^particles: expected squared norms .* got an overflow"):
                call(particles, scale, others=others, normalize=normalize, backend=backend)
    with pytest.raises(NotFinite, match="an overflow"):  # of others alone
        ff.repulsion(torch.ones(1, 2, 300).to(dtype), scale, others=particles[:1], backend=backend)
    with pytest.raises(NotFinite, match="an overflow"):
        ff.repulsion(particles[:1], scale, backend=backend)


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
