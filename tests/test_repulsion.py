"""The operation: every backend against the published code's numbers and against the float64 oracle."""

from pathlib import Path

import numpy as np
import pytest
import torch

import forde_fast as ff
from forde_fast import reference
from forde_fast.testing import CASES, DRAWS, compare, make_particles, make_pca
from forde_fast.validation import NotFinite

GOLDEN = sorted((Path(__file__).parent / "golden").glob("repulsion_*.npz"))
FAST = ["cpp", "triton"]  # "cuda" does the default path only: test_cuda.py
F32, F64, BF16 = torch.float32, torch.float64, torch.bfloat16


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


SCALES = {F32: 1e30, F64: 1e160, torch.bfloat16: 1e30}  # whose squares are out of range


@pytest.mark.parametrize("dtype", SCALES, ids=str)
@pytest.mark.parametrize("kind", ["identity", "pca", "low rank"])
def test_overflow_is_found_on_every_way(kind, dtype, backend):
    particles = torch.randn(4, 2, 300).to(dtype) * SCALES[dtype]
    if particles.is_cuda:
        pytest.skip("waits for particles on a CPU: those on a GPU are not inspected, which would wait for it")
    scale = lengthscale(kind, 300)
    for others, normalize in ((None, True), (None, False), (particles[:1] * 0.5, True), (particles[:1] * 0.5, False)):
        for call in (ff.repulsion, ff.distances):
            with pytest.raises(NotFinite, match=r"^particles: expected squared norms .* got an overflow"):
                call(particles, scale, others=others, normalize=normalize, backend=backend)
    with pytest.raises(NotFinite, match="an overflow"):  # of others alone
        ff.repulsion(torch.ones(1, 2, 300).to(dtype), scale, others=particles[:1], backend=backend)
    with pytest.raises(NotFinite, match="an overflow"):
        ff.repulsion(particles[:1], scale, backend=backend)
