"""Lengthscales: what C is, how it is fitted, and what a file holds."""

import os

import pytest
import torch
from safetensors.torch import save_file

import forde_fast as ff

F32, F64 = torch.float32, torch.float64


def matrix(pca):
    """C by its definition, from the eigenvectors alone."""
    u, size = pca.eigenvectors, pca.dimension
    rest = torch.eye(size, dtype=F64) - u @ u.T
    return u @ torch.diag(pca.eigenvalues) @ u.T + (pca.tail * rest if pca.rank < size else 0)


def basis(size):
    return torch.linalg.qr(torch.randn(size, size, dtype=F64))[0]


def covariance(images, center):
    x = images.double().flatten(1)
    x = x - x.mean(0) if center else x
    return x.T @ x / (len(x) - 1)


def images_of(count, *shape, dtype=F64):
    """Correlated, with a mean: as images are."""
    x = torch.randn(count, *shape, dtype=F64)
    return (x + 0.7 * x.roll(1, -1) + torch.randn(1, *shape, dtype=F64)).to(dtype)


def close(a, b, tolerance=1e-10):
    return float((a - b).norm() / b.norm()) < tolerance


@pytest.mark.parametrize("center", [True, False])
def test_fit_is_the_eigendecomposition_of_the_covariance(center):
    images = images_of(50, 2, 3, 4)
    pca = ff.PCA.fit(images, center=center)
    exact = covariance(images, center)
    assert close(matrix(pca), exact)
    assert close(pca.eigenvalues, torch.linalg.eigvalsh(exact).flip(0))
    assert close(pca.eigenvectors.T @ pca.eigenvectors, torch.eye(24, dtype=F64))
    assert (pca.dimension, pca.rank) == (24, 24)


def test_fit_centres_by_default():
    images = images_of(30, 6)
    assert close(matrix(ff.PCA.fit(images)), covariance(images, True))
    assert not close(covariance(images, True), covariance(images, False), 0.1)


@pytest.mark.parametrize("center", [True, False])
@pytest.mark.parametrize("sizes", [[37], [1] * 37, [20, 1, 16], [36, 1]], ids=len)
def test_streamed_batches_are_one_batch(center, sizes):
    images = images_of(37, 3, 5, dtype=F32)
    whole = ff.PCA.fit(images, center=center)
    batches = images.split(sizes)
    pairs = [(batch, torch.zeros(len(batch), dtype=torch.long)) for batch in batches]
    for stream in (list(batches), iter(batches), pairs, [list(pair) for pair in pairs]):
        assert close(matrix(ff.PCA.fit(stream, center=center)), matrix(whole), 1e-11)


def test_more_images_than_a_chunk():
    images = images_of(5000, 4, dtype=F32)
    assert close(matrix(ff.PCA.fit(images)), covariance(images, True), 1e-11)


def test_large_offset_in_float32_is_accumulated_in_float64():
    """Sums in float32 would lose the variance 1 under 1e8, and uncentred ones in float64 all but 8 digits."""
    images = (1e4 + torch.randn(4000, 7)).float()
    assert close(matrix(ff.PCA.fit(images)), covariance(images, True), 1e-12)
    assert close(matrix(ff.PCA.fit(images.split(900))), covariance(images, True), 1e-12)
    # a first batch that is far from the others' mean
    shifted = torch.cat([images[:1] - 2e4, images])
    assert close(matrix(ff.PCA.fit(shifted.split([1, 4000]))), covariance(shifted, True), 1e-10)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, F32], ids=str)
def test_fit_takes_any_floating_dtype_and_keeps_float64(dtype):
    images = images_of(40, 5).to(dtype)
    pca = ff.PCA.fit(images)
    assert pca.eigenvectors.dtype == pca.eigenvalues.dtype == F64
    assert close(matrix(pca), covariance(images, True))


def test_fit_reads_strided_images_and_leaves_them_alone():
    images = images_of(40, 3, 6)[:, :, ::2].requires_grad_()
    before = images.detach().clone()
    pca = ff.PCA.fit(images)
    assert close(matrix(pca), covariance(before, True))
    assert torch.equal(images, before)
    assert not pca.eigenvectors.requires_grad


@pytest.mark.parametrize("rank", [1, 3, 8, 11, 12])
@pytest.mark.parametrize("scale", [None, "unit_mean"])
def test_rank_keeps_the_largest_and_the_midrange_of_the_tail(rank, scale):
    images = images_of(100, 12)
    full, pca = ff.PCA.fit(images, scale=scale), ff.PCA.fit(images, rank=rank, scale=scale)
    tail = full.eigenvalues[rank:]
    assert torch.equal(pca.eigenvalues, full.eigenvalues[:rank])
    assert (full.eigenvalues.diff() <= 0).all()
    if rank == 12:
        return
    assert pca.tail == pytest.approx(float(tail.max() + tail.min()) / 2)
    ds = torch.randn(50, 12, dtype=F64)
    error = ((ds @ matrix(pca)) * ds).sum(1) - ((ds @ matrix(full)) * ds).sum(1)
    bound = (tail - pca.tail).abs().max() * (ds @ full.eigenvectors[:, rank:]).square().sum(1)
    assert (error.abs() <= bound + 1e-12).all()
    worst = full.eigenvectors[:, -1]  # where the bound is reached
    error = float(worst @ matrix(pca) @ worst - tail[-1])
    assert error == pytest.approx(float((tail - pca.tail).abs().max()))


def test_unit_mean_divides_by_the_trace_over_d():
    images = images_of(60, 9)
    plain = ff.PCA.fit(images)
    for rank in (None, 3):
        scaled = ff.PCA.fit(images, rank=rank, scale="unit_mean")
        wanted = plain.eigenvalues / (covariance(images, True).trace() / 9)
        assert close(scaled.eigenvalues, wanted[: scaled.rank])
    assert float(ff.PCA.fit(images, scale="unit_mean").eigenvalues.mean()) == pytest.approx(1)


def test_fewer_images_than_dimensions():
    images = images_of(5, 20)
    pca = ff.PCA.fit(images)
    assert close(matrix(pca), covariance(images, True))
    assert (pca.eigenvalues >= 0).all()
    assert (pca.eigenvalues[4:] < 1e-12).all()  # rank N - 1 once centred
    low = ff.PCA.fit(images, rank=3)
    assert low.tail == pytest.approx(float(pca.eigenvalues[3]) / 2)


@pytest.mark.parametrize("value", [0.0, 0.1, 1 / 3, 1e4 + 0.1])
def test_constant_pixels_weigh_nothing(value):
    images = images_of(40, 6)
    images[:, 2] = value
    pca = ff.PCA.fit(images)
    axis = torch.zeros(6, dtype=F64)
    axis[2] = 1
    assert abs(float(axis @ matrix(pca) @ axis)) < 1e-12 * max(value, 1) ** 2
    constant = torch.full((40, 6), value, dtype=F64)
    assert (ff.PCA.fit(constant).eigenvalues < 1e-20 * max(value, 1) ** 2).all()
    with pytest.raises(ValueError, match=r"^images: expected some variance"):
        ff.PCA.fit(constant.float(), scale="unit_mean")


GOOD = torch.zeros(4, 6)
BAD_IMAGES = [
    (torch.zeros(4, 6, dtype=torch.uint8), TypeError, r"^images: expected floats.*uint8"),
    (GOOD.long(), TypeError, r"^images: expected floats.*int64"),
    ([(GOOD, GOOD), GOOD.long()], TypeError, r"^images: expected floats.*int64"),
    ([GOOD.numpy()], TypeError, r"^images: expected tensors, got ndarray"),
    (GOOD / 0, ValueError, r"^images: expected finite numbers, got nan at \[0, 0\]"),
    ([GOOD, GOOD + float("inf")], ValueError, r"^images: expected finite numbers, got inf"),
    (GOOD[0], ValueError, r"^images: expected \[N, ...\].*\[6\]"),
    (GOOD[:0], ValueError, r"^images: expected .* none empty, got shape \[0, 6\]"),
    ([GOOD, GOOD[:0]], ValueError, r"^images: expected .* none empty, got shape \[0, 6\]"),
    (GOOD[:1], ValueError, r"^images: expected at least 2, got 1"),
    ([], ValueError, r"^images: expected at least 2, got 0"),
    ([GOOD, torch.zeros(4, 7)], ValueError, r"^images: expected shape \[6\] each.*got \[7\]"),
]


@pytest.mark.parametrize(("images", "error", "message"), BAD_IMAGES, ids=[m for *_, m in BAD_IMAGES])
def test_bad_images_are_named(images, error, message):
    with pytest.raises(error, match=message):
        ff.PCA.fit(images)


@pytest.mark.parametrize("rank", [0, -1, 7, 2.5, True, "3"])
def test_rank_out_of_range(rank):
    with pytest.raises(ValueError, match=r"^rank: expected .*, got "):
        ff.PCA.fit(images_of(20, 6), rank=rank)


def test_unknown_scale():
    with pytest.raises(ValueError, match=r"^scale: expected None or 'unit_mean', got 'trace'"):
        ff.PCA.fit(images_of(20, 6), scale="trace")


VALUES = torch.tensor([9.0, 1.0, 0.25, 0.0], dtype=F64)


@pytest.mark.parametrize(
    ("form", "wanted"),
    # written out: (1 - a) + a l, and 1 / ((1 - a) + a / l), at a = 0.4
    [("arithmetic", [4.2, 1.0, 0.7, 0.6]), ("harmonic", [1 / (0.6 + 0.4 / 9), 1.0, 1 / (0.6 + 1.6), 0.0])],
)
def test_blend_follows_its_formula_and_is_exact_at_the_ends(form, wanted):
    pca = ff.PCA(basis(6)[:, :4], VALUES, tail=0.25)
    middle = pca.blend(0.4, form)
    assert torch.allclose(middle.eigenvalues, torch.tensor(wanted, dtype=F64), rtol=1e-14)
    assert middle.tail == pytest.approx(wanted[2])
    for zero in (0, 0.0):
        assert torch.equal(pca.blend(zero, form).eigenvalues, torch.ones(4, dtype=F64))
        assert pca.blend(zero, form).tail == 1
    for one in (1, 1.0):
        assert torch.equal(pca.blend(one, form).eigenvalues, VALUES)
        assert pca.blend(one, form).tail == 0.25
    assert torch.equal(pca.eigenvalues, VALUES)  # a new one, the old as it was


@pytest.mark.parametrize("alpha", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("rank", [2, 5, 8])
def test_blend_is_the_blend_of_the_matrices(alpha, rank):
    for tail in (0.0, 0.3):
        pca = ff.PCA(basis(8)[:, :rank], torch.rand(rank, dtype=F64), tail)
        wanted = (1 - alpha) * torch.eye(8, dtype=F64) + alpha * matrix(pca)
        blend = pca.blend(alpha)
        assert torch.allclose(matrix(blend), wanted, atol=1e-14)
        s = torch.randn(5, 8, dtype=F64)
        assert torch.allclose(blend.product(s), s @ wanted, atol=1e-13)


@pytest.mark.parametrize("alpha", [-0.1, 1.1, float("nan"), "0.4", None])
def test_alpha_out_of_range(alpha):
    with pytest.raises(ValueError, match=r"^alpha: expected a number from 0 to 1, got "):
        ff.PCA(basis(4), VALUES).blend(alpha)


def test_unknown_form_lists_the_forms():
    with pytest.raises(ValueError, match=r"^form: expected one of arithmetic, harmonic, got 'geometric'"):
        ff.PCA(basis(4), VALUES).blend(0.4, "geometric")


# D, K, tail: full; one dimension; thin (2K <= D) without and with tail; K near D with tail; K > D/2 without
PRODUCTS = [(10, 10, 0.0), (1, 1, 0.0), (10, 5, 0.0), (11, 5, 0.3), (12, 1, 2.0), (10, 9, 0.3), (11, 6, 0.0)]


@pytest.mark.parametrize(("size", "rank", "tail"), PRODUCTS)
def test_product_is_s_times_c(size, rank, tail):
    pca = ff.PCA(basis(size)[:, :rank], torch.rand(rank, dtype=F64) * 50, tail)
    s = torch.randn(7, size, dtype=F64)
    before = s.clone()
    for _ in range(2):  # the second time from the cache
        assert close(pca.product(s), s @ matrix(pca), 1e-13)
        assert close(pca.product(s.float()).double(), s @ matrix(pca), 1e-6)
    assert torch.equal(s, before)
    assert pca.product(s.float()).dtype == F32
    assert close(pca.product(s.T.contiguous().T), s @ matrix(pca), 1e-13)


@pytest.mark.parametrize(("size", "rank", "tail"), PRODUCTS)
def test_coordinates_have_the_distances(size, rank, tail):
    pca = ff.PCA(basis(size)[:, :rank], torch.rand(rank, dtype=F64) * 50, tail)
    s = torch.randn(4, 3, size, dtype=F64)
    x, ds = pca.coordinates(s), s[:, None] - s[None]
    wanted = torch.einsum("ijbd,de,ijbe->ijb", ds, matrix(pca), ds)
    assert torch.allclose((x[:, None] - x[None]).square().sum(-1), wanted, rtol=1e-11, atol=1e-11)
    assert pca.coordinates(s.float()).dtype == F32


def test_tail_means_nothing_where_the_basis_is_complete():
    u, values = basis(5), torch.rand(5, dtype=F64)
    s = torch.randn(3, 5, dtype=F64)
    with_tail, without = ff.PCA(u, values, tail=7.0), ff.PCA(u, values)
    assert torch.equal(with_tail.product(s), without.product(s))
    assert torch.equal(with_tail.coordinates(s), without.coordinates(s))


def test_identity_is_the_identity():
    s = torch.randn(4, 9)
    assert torch.equal(ff.Identity().product(s), s)
    assert torch.equal(ff.Identity().coordinates(s), s)
    assert ff.Identity().dimension is None


@pytest.mark.parametrize("dtype", [F32, torch.bfloat16], ids=str)
def test_given_in_lower_precision_is_kept_in_float64(dtype):
    pca = ff.PCA(torch.eye(4, dtype=dtype), VALUES.to(dtype))
    assert pca.eigenvectors.dtype == pca.eigenvalues.dtype == F64


U, L = torch.eye(4), torch.ones(4)
BAD_PCA = [
    ((U[0], L), ValueError, r"^eigenvectors: expected 2 dimensions \[D, K\], got shape \[4\]"),
    ((U[:2], L), ValueError, r"^eigenvectors: expected K <= D columns, got shape \[2, 4\]"),
    ((U, L[:3]), ValueError, r"^eigenvalues: expected 4, one per column, got 3"),
    ((U, L[None]), ValueError, r"^eigenvalues: expected 1 dimensions \[K\], got shape \[1, 4\]"),
    ((U[:, :0], L[:0]), ValueError, r"^eigenvectors: expected at least one"),
    ((U.long(), L), TypeError, r"^eigenvectors: expected float32, float64 or bfloat16, got torch.int64"),
    ((U, L.long()), TypeError, r"^eigenvalues: expected float32, float64 or bfloat16, got torch.int64"),
    ((U.half(), L), TypeError, r"^eigenvectors: expected .* got torch.float16"),
    ((U.numpy(), L), TypeError, r"^eigenvectors: expected a torch.Tensor, got ndarray"),
    ((U * float("nan"), L), ValueError, r"^eigenvectors: expected finite numbers, got nan"),
    ((U, L * float("inf")), ValueError, r"^eigenvalues: expected finite numbers, got inf"),
    ((U, L - 1.5), ValueError, r"^eigenvalues: expected values >= 0, got -0.5"),
    ((U, L, -1.0), ValueError, r"^tail: expected a finite number >= 0, got -1.0"),
    ((U, L, float("nan")), ValueError, r"^tail: expected a finite number >= 0, got nan"),
]


@pytest.mark.parametrize(("given", "error", "message"), BAD_PCA, ids=[m for *_, m in BAD_PCA])
def test_bad_eigenvectors_and_eigenvalues_are_named(given, error, message):
    with pytest.raises(error, match=message):
        ff.PCA(*given)


SAVED = {
    "full": lambda: ff.PCA.fit(images_of(30, 6)),
    "low rank": lambda: ff.PCA.fit(images_of(30, 6), rank=2),
    "tuned": lambda: ff.PCA.fit(images_of(30, 6), rank=2).blend(0.4),
    "strided": lambda: ff.PCA(basis(6).T[:, ::2], torch.rand(6, dtype=F64)[::2]),
}


@pytest.mark.parametrize("make", SAVED.values(), ids=SAVED)
def test_pca_comes_back_as_it_was(make, tmp_path):
    pca = make()
    pca.save(tmp_path / "scale.safetensors")
    pca.save(str(tmp_path / "scale.safetensors"))  # over the old one, and by a string
    assert os.listdir(tmp_path) == ["scale.safetensors"]
    for kind in (ff.PCA, ff.lengthscales.Lengthscale):
        loaded = kind.load(tmp_path / "scale.safetensors")
        assert type(loaded) is ff.PCA
        assert torch.equal(loaded.eigenvectors, pca.eigenvectors)
        assert torch.equal(loaded.eigenvalues, pca.eigenvalues)
        assert loaded.tail == pca.tail
    s = torch.randn(3, 6)
    assert torch.equal(loaded.product(s), pca.product(s))


def test_identity_comes_back(tmp_path):
    path = tmp_path / "scale.safetensors"
    ff.Identity().save(path)
    assert type(ff.Identity.load(path)) is ff.Identity
    assert type(ff.lengthscales.Lengthscale.load(path)) is ff.Identity
    with pytest.raises(ValueError, match=r"^path: expected a file holding PCA, got .*Identity"):
        ff.PCA.load(path)
    ff.PCA(U, L).save(path)
    with pytest.raises(ValueError, match=r"^path: expected a file holding Identity, got .*PCA"):
        ff.Identity.load(path)


def test_files_that_hold_no_lengthscale(tmp_path):
    path = tmp_path / "scale.safetensors"
    with pytest.raises(FileNotFoundError, match=r"^path: expected a file saved by a lengthscale, got "):
        ff.PCA.load(path)
    with pytest.raises(FileNotFoundError, match=r"^path: "):
        ff.PCA.load(tmp_path)
    save_file({"eigenvectors": U, "eigenvalues": L}, path)  # safetensors of someone else
    with pytest.raises(ValueError, match=r"^path: expected a file holding PCA"):
        ff.PCA.load(path)
    for content in (b"", b"short", b"\x00" * 64, b"not safetensors at all" * 10):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"^path: expected a lengthscale in safetensors, got "):
            ff.PCA.load(path)
    ff.PCA(U, L).save(path)
    whole = path.read_bytes()
    for length in (7, 50, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=r"^path: expected a lengthscale in safetensors, got "):
            ff.PCA.load(path)


def test_a_save_that_fails_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "scale.safetensors"
    ff.PCA(U, L).save(path)
    before = path.read_bytes()

    def full_disk(descriptor):
        raise OSError("no space left on device")

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(OSError, match="no space"):
        ff.PCA(U, 2 * L).save(path)
    monkeypatch.undo()
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == [path.name]
    assert torch.equal(ff.PCA.load(path).eigenvalues, L.double())
