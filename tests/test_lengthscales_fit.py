"""Fits that never form D x D, and the cosine basis: against the plain formulas in float64."""

import math

import pytest
import torch
from scipy.fft import dctn

import forde_fast as ff
from forde_fast.lengthscales import spectrum
from forde_fast.lengthscales.sketch import Sketch

F32, F64 = torch.float32, torch.float64


@pytest.fixture
def sketched(monkeypatch):
    """Every fit with a rank or an error goes by the sketch, which keeps twice the rank."""
    monkeypatch.setattr(spectrum, "COVARIANCE_LIMIT", 0)
    monkeypatch.setattr(spectrum, "FEWEST_KEPT", 1)


def decaying(count, size, power=1.0, dtype=F64):
    """Images with eigenvalues i^-power in a random basis, far from the origin."""
    turn = torch.linalg.qr(torch.randn(size, size, dtype=F64))[0]
    x = torch.randn(count, size, dtype=F64) * torch.arange(1, size + 1, dtype=F64) ** (-power / 2)
    return (x @ turn + 5 * torch.randn(size, dtype=F64)).to(dtype)


def svd_of(images, center=True):
    """Eigenvalues and eigenvectors of the covariance, from the images themselves."""
    x = images.double().flatten(1)
    x = x - x.mean(0) if center else x
    _, singular, v = torch.linalg.svd(x, full_matrices=False)
    return singular.square() / (len(x) - 1), v.T


def matrix(scale):
    """C, from its product with the identity."""
    return scale.product(torch.eye(scale.dimension, dtype=F64))


def covariance(images, center=True):
    values, vectors = svd_of(images, center)
    return vectors * values @ vectors.T


def spectral(matrix):
    return float(torch.linalg.matrix_norm(matrix, 2))


def close(a, b, tolerance=1e-9):
    return float((a - b).norm() / b.norm()) < tolerance


@pytest.mark.parametrize("center", [True, False])
@pytest.mark.parametrize("sizes", [[40], [1] * 40, [7, 30, 3]], ids=len)
def test_images_that_fit_the_sketch_are_exact(sketched, center, sizes):
    """N <= 6 rank: the singular value decomposition of the images, without the covariance."""
    images = decaying(40, 90)
    values, vectors = svd_of(images, center)
    pca = ff.PCA.fit(iter(images.split(sizes)), rank=8, center=center)
    assert close(pca.eigenvalues, values[:8])
    assert close(
        pca.eigenvectors * pca.eigenvalues @ pca.eigenvectors.T, vectors[:, :8] * values[:8] @ vectors[:, :8].T
    )
    assert pca.tail == pytest.approx(float(values[8]) / 2)  # the smallest is 0: less images than dimensions
    assert pca.error_bound == pytest.approx(2 * float(values[8]))
    everything = ff.PCA.fit(images, rank=60, center=center)  # more than there are directions
    assert close(matrix(everything), covariance(images, center))
    assert everything.error_bound < 1e-12


@pytest.mark.parametrize("center", [True, False])
@pytest.mark.parametrize("power", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("rank", [1, 5, 20])
def test_bound_holds_when_the_sketch_overflows(sketched, rank, power, center):
    images = decaying(500, 60, power)
    images[250:] += 1.0  # a mean that moves
    exact = covariance(images, center)
    pca = ff.PCA.fit(images.split(64), rank=rank, center=center)
    error = spectral(matrix(pca) - exact)
    assert error <= pca.error_bound / 4 * (1 + 1e-9)
    assert pca.error_bound / 4 < 0.9 * spectral(exact)  # a promise that says something
    assert close(pca.eigenvectors.T @ pca.eigenvectors, torch.eye(rank, dtype=F64))
    assert (pca.eigenvalues <= torch.linalg.eigvalsh(exact).flip(0)[:rank] * (1 + 1e-9)).all()


def test_sorted_images_are_within_the_bound(sketched):
    """Every block has directions of its own: the worst order for a stream."""
    images = torch.eye(48, dtype=F64).repeat_interleave(20, 0) * torch.rand(960, 1, dtype=F64)
    for rank in (2, 8):
        pca = ff.PCA.fit(images, rank=rank)
        assert spectral(matrix(pca) - covariance(images)) <= pca.error_bound / 4 * (1 + 1e-9)


@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize("scale", [None, "unit_mean"])
@pytest.mark.parametrize("share", [1.0, 0.5, 0.05])
def test_rank_of_a_requested_error(monkeypatch, whole, scale, share):
    """d of random unit particles is within it, and the rank below is not, by the bound of MATH.md."""
    monkeypatch.setattr(spectrum, "COVARIANCE_LIMIT", 4096 if whole else 0)
    images = decaying(300, 40)
    exact = covariance(images)
    exact = exact / (exact.trace() / 40) if scale else exact
    error = share * spectral(exact)
    pca = ff.PCA.fit(images, error=error, scale=scale)
    assert pca.error_bound <= error
    s = torch.nn.functional.normalize(torch.randn(2000, 40, dtype=F64), dim=1)
    s[0], s[1] = pca.eigenvectors[:, -1], -pca.eigenvectors[:, -1]
    ds = s[::2] - s[1::2]
    measured = (ds @ (matrix(pca) - exact) * ds).sum(1).abs().max()
    assert measured <= pca.error_bound
    values = torch.linalg.eigvalsh(exact).flip(0)
    assert 2 * (values[pca.rank - 1] - values[-1]) > error or pca.rank == 1
    assert pca.error_bound == pytest.approx(2 * float(values[pca.rank] - values[-1]))


def test_error_that_cannot_be_promised(sketched, monkeypatch):
    monkeypatch.setattr(spectrum, "MOST_KEPT", 4)
    images = decaying(300, 40)
    with pytest.raises(ValueError, match=r"^error: expected at least [\d.]+, .*, got 0.001"):
        ff.PCA.fit(images, error=1e-3)
    for bad in (0, -1.0, math.nan, "small"):
        with pytest.raises(ValueError, match=r"^error: expected a finite number > 0, got "):
            ff.PCA.fit(images, error=bad)
    with pytest.raises(ValueError, match=r"^error: expected None where a rank is given, got 0.1"):
        ff.PCA.fit(images, rank=3, error=0.1)


def test_unit_mean_is_exact_although_the_sketch_drops_directions(sketched):
    images = decaying(400, 50, 0.5, F32)
    plain, scaled = ff.PCA.fit(images, rank=4), ff.PCA.fit(images, rank=4, scale="unit_mean")
    mean = float(covariance(images).trace() / 50)
    assert close(scaled.eigenvalues, plain.eigenvalues / mean)
    assert scaled.tail == pytest.approx(plain.tail / mean)
    assert scaled.error_bound == pytest.approx(plain.error_bound / mean)


def test_sketch_memory_and_what_it_lost():
    sketch, images = Sketch(30, 4, True, "cpu"), decaying(200, 30)
    for part in images.split(23):
        sketch.add(part)
    squares, _ = sketch.spectrum()
    assert sketch.rows.shape == (13, 30)
    x = images - images.mean(0)
    scatter, rows = x.T @ x, sketch.rows[: sketch.filled]
    rest = torch.linalg.eigvalsh(scatter - rows.T @ rows)
    assert rest[0] > -1e-9
    assert rest[-1] <= sketch.lost * (1 + 1e-9)
    assert sketch.trace == pytest.approx(float(scatter.trace()))
    assert close(squares[: len(squares)].sum(), rows.square().sum())


def test_imagenet_sized_inputs():
    """150,528 inputs: a D x D matrix would take 181 GB."""
    size = 3 * 224 * 224
    directions = torch.linalg.qr(torch.randn(size, 4))[0]
    images = torch.randn(30, 4) * torch.tensor([8.0, 4, 2, 1]) @ directions.T
    pca = ff.PCA.fit(iter(images.view(30, 3, 224, 224).split(10)), rank=4)
    x = images.double() - images.double().mean(0)
    exact = torch.linalg.eigvalsh(x @ x.T / 29).flip(0)[:4]
    assert close(pca.eigenvalues, exact)
    assert pca.error_bound < 1e-6 * exact[0]
    s = torch.nn.functional.normalize(torch.randn(3, size), dim=1)
    wanted = (s.double() @ x.T @ x) / 29
    assert close(pca.product(s).double(), wanted, 1e-4)
    with pytest.raises(ValueError, match=r"^rank: expected one, or an error, for D = 150528"):
        ff.PCA.fit(images)


@pytest.mark.parametrize("alpha", [0, 0.1, 0.4, 0.9, 1])
@pytest.mark.parametrize("form", ["arithmetic", "harmonic"])
def test_blend_bounds_what_it_does_to_the_error(sketched, alpha, form):
    images = decaying(400, 30)
    plain = ff.PCA.fit(images, rank=3)
    pca, error = plain.blend(alpha, form), plain.error_bound / 4  # of C
    values, vectors = torch.linalg.eigh(covariance(images))
    values = (1 - alpha) + alpha * values if form == "arithmetic" else values / ((1 - alpha) * values + alpha)
    exact = vectors * values @ vectors.T if alpha else torch.eye(30, dtype=F64)
    assert spectral(matrix(pca) - exact) <= pca.error_bound / 4 + 1e-12
    if form == "harmonic" and alpha:
        assert pca.error_bound / 4 == pytest.approx(error / ((1 - alpha) * error + alpha))
    else:
        assert pca.error_bound / 4 == pytest.approx(alpha * error)


SHAPES = [(3, 6, 5), (1, 4, 4), (2, 1, 7), (9,), (5, 6)]


def dct(x):
    return torch.from_numpy(dctn(x.numpy(), type=2, norm="ortho", axes=range(1, x.ndim)))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_cosine_is_the_dct(shape):
    images = torch.randn(30, *shape, dtype=F64) + torch.randn(shape, dtype=F64)
    for center in (True, False):
        cosines = dct(images)
        exact = cosines.var(0) if center else cosines.square().sum(0) / 29
        for stream in (images, images.split(7), iter([(images[:1], None), (images[1:], None)])):
            assert close(ff.Cosine.fit(stream, center).weights, exact)
    scale = ff.Cosine.fit(images)
    s = torch.randn(4, 3, math.prod(shape), dtype=F64)
    exact = dct(s.view(12, *shape)) * scale.weights.sqrt()
    assert close(scale.coordinates(s), exact.view_as(s))
    rows = s.flatten(0, 1)
    u = dct(torch.eye(scale.dimension, dtype=F64).view(-1, *shape)).flatten(1)  # row e: the cosines of pixel e
    assert close(scale.product(rows), rows @ (u * scale.weights.flatten()) @ u.T)
    assert close(scale.product(rows.float()).double(), scale.product(rows), 1e-6)
    assert close(scale.product(rows.T.contiguous().T), scale.product(rows))
    assert scale.product(rows.float()).dtype == F32
    assert (scale.dimension, scale.shape) == (math.prod(shape), shape)


def test_cosine_is_the_principal_components_of_shift_invariant_images():
    """For covariance diagonal in the cosines it is the PCA; trace and unit mean are the covariance's for any."""
    weights = torch.rand(3, 4, 5, dtype=F64)
    basis = ff.Cosine(torch.ones(60, dtype=F64).view(3, 4, 5))
    assert close(matrix(basis), torch.eye(60, dtype=F64))
    c = matrix(ff.Cosine(weights))
    assert close(torch.linalg.eigvalsh(c), weights.flatten().sort().values)
    images = torch.randn(50, 3, 4, 5, dtype=F64)
    fitted = ff.Cosine.fit(images)
    assert close(fitted.weights.sum(), covariance(images).trace())
    assert (
        fitted.variance == ff.Cosine.fit(images, scale="unit_mean").blend(0.4).variance == float(fitted.weights.sum())
    )
    assert float(ff.Cosine.fit(images, scale="unit_mean").weights.mean()) == pytest.approx(1)


def test_cosine_blends_as_the_matrices_do():
    scale, eye = ff.Cosine(torch.rand(2, 3, 4) * 9), torch.eye(24, dtype=F64)
    assert close(matrix(scale.blend(0.4)), 0.6 * eye + 0.4 * matrix(scale))
    harmonic = torch.linalg.inv(0.6 * eye + 0.4 * torch.linalg.inv(matrix(scale)))
    assert close(matrix(scale.blend(0.4, "harmonic")), harmonic)
    assert torch.equal(scale.blend(1).weights, scale.weights)
    assert (scale.blend(0).weights == 1).all()
    with pytest.raises(ValueError, match=r"^alpha: expected a number from 0 to 1, got 2"):
        scale.blend(2)


def test_identity_blends_to_itself():
    assert isinstance(ff.Identity().blend(0.4, "harmonic"), ff.Identity)
    with pytest.raises(ValueError, match=r"^form: expected one of arithmetic, harmonic, got 'geometric'"):
        ff.Identity().blend(0.4, "geometric")


@pytest.mark.parametrize("backend", [name for name, usable in ff.available_backends().items() if usable])
def test_cosine_on_every_backend(backend):
    """The same C as the PCA of its eigenvectors, so the same result."""
    particles, scale = torch.randn(3, 2, 30, dtype=F64), ff.Cosine(torch.rand(2, 3, 5) * 9)
    values, vectors = torch.linalg.eigh(matrix(scale))
    wanted = ff.repulsion(particles, ff.PCA(vectors, values.clamp_min(0)), backend="reference")
    if backend in ("triton", "cuda") and torch.cuda.is_available():
        particles = particles.cuda()
    result = ff.repulsion(particles, scale, backend=backend)
    for part, same in zip(result, wanted, strict=True):
        assert torch.allclose(part.cpu(), same, rtol=1e-9, atol=1e-13)
    with pytest.raises(ValueError, match=r"^particles: expected D = 30 as the lengthscale, got 29"):
        ff.repulsion(particles[..., 1:], scale, backend=backend)


def test_cosine_and_error_bound_come_back(tmp_path, sketched):
    path, scale = tmp_path / "scale.safetensors", ff.Cosine(torch.rand(2, 3, 4))
    scale.save(path)
    for kind in (ff.Cosine, ff.lengthscales.Lengthscale):
        assert torch.equal(kind.load(path).weights, scale.weights)
    with pytest.raises(ValueError, match=r"^path: expected a file holding PCA, got .*Cosine"):
        ff.PCA.load(path)
    pca = ff.PCA.fit(decaying(100, 20), rank=2)
    pca.save(path)
    assert ff.PCA.load(path).error_bound == pca.error_bound > 0


BAD_WEIGHTS = [
    ([1.0], TypeError, r"^weights: expected a torch.Tensor, got list"),
    (
        torch.ones(3, dtype=torch.long),
        TypeError,
        r"^weights: expected float32, float64 or bfloat16, got torch.int64",
    ),
    (torch.ones(3, 0), ValueError, r"^weights: expected the shape of an image, none empty, got shape \[3, 0\]"),
    (torch.tensor(1.0), ValueError, r"^weights: expected the shape of an image, none empty, got shape \[\]"),
    (torch.tensor([1.0, math.nan]), ValueError, r"^weights: expected finite numbers, got nan at \[1\]"),
    (torch.tensor([1.0, -1.0]), ValueError, r"^weights: expected values >= 0, got -1.0"),
]


@pytest.mark.parametrize(("given", "error", "message"), BAD_WEIGHTS, ids=[m for *_, m in BAD_WEIGHTS])
def test_bad_weights_are_named(given, error, message):
    with pytest.raises(error, match=message):
        ff.Cosine(given)


def test_bad_images_of_cosines():
    with pytest.raises(ValueError, match=r"^images: expected shape \[2, 3\] each, as in the first batch, got \[6\]"):
        ff.Cosine.fit([torch.ones(4, 2, 3), torch.ones(4, 6)])
    with pytest.raises(ValueError, match=r"^images: expected at least 2, got 0"):
        ff.Cosine.fit([])
    with pytest.raises(ValueError, match=r"^images: expected some variance for scale='unit_mean', got none"):
        ff.Cosine.fit(torch.ones(4, 6), scale="unit_mean")
    with pytest.raises(TypeError, match=r"^images: expected a tensor or batches, got NoneType"):
        ff.PCA.fit(None)
