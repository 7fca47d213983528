"""The Triton kernels against the formulas, in interpreter mode on CPU tensors where there is no GPU.

conftest.py sets TRITON_INTERPRET before Triton is imported. A result may be twice as far from float64 as the same
formula is in plain PyTorch, and 8 units of rounding more.
"""

import math

import pytest
import torch
from forde_fast.kernels import repulsion, tiles

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
EPS = 1e-24

SHAPES = [  # members, others, samples, columns
    (1, None, 5, 7),  # a single model
    (2, None, 5, 1),  # one column: normalised rows are signs
    (2, None, 1, 7),  # one pair, unaligned columns
    (3, None, 5, 192),
    (10, None, 1, 3072),  # the published size
    (10, None, 5, 7),
    (17, None, 1, 192),  # blocks of pairs, the last not full
    (34, None, 1, 7),
    (1, 1, 5, 7),  # others: the last member of a rank and one neighbour
    (3, 5, 5, 192),
    (10, 3, 1, 7),
    (5, 17, 1, 7),
]
KINDS = ["random", "close", "close pair", "duplicated", "zeros", "dead row"]


@pytest.fixture(params=["at once", "in blocks"])
def path(request, monkeypatch):
    """The kernels for a few rows, and those for many with blocks of two: five rows need three, the last not full."""
    if request.param == "in blocks":
        monkeypatch.setattr(repulsion, "_most_rows_at_once", lambda acc: 1)
        monkeypatch.setattr(repulsion, "ROWS_AT_ONCE", 1)
        monkeypatch.setattr(repulsion, "_even_blocks", lambda rows, most: 2)
    return request.param


def make_rows(kind, members, samples, columns, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(members, samples, columns, generator=generator, dtype=torch.float64)
    noise = torch.randn(x.shape, generator=generator, dtype=torch.float64)
    if kind == "close":
        x = x[:1] + 1e-3 * noise
    elif kind == "close pair":
        x[-1] = x[0] + 1e-4 * noise[0]
    elif kind == "duplicated":
        x[-1] = x[0]
    elif kind == "zeros":
        x.zero_()
    elif kind == "dead row":
        x[-1, 0] = 0
    return x.to(dtype).to(DEVICE)


def plain_rows(particles, others, normalize, eps=EPS):
    rows = particles if others is None else torch.cat([particles, others])
    inverse_norm = 1 / (rows.square().sum(-1) + eps).sqrt() if normalize else torch.ones_like(rows[..., 0])
    return rows * inverse_norm[..., None], inverse_norm


def plain_contrasts(particles, others, normalize):
    s, _ = plain_rows(particles, others, normalize)
    N = len(s)
    return s[1:] - (s[1:].sum(0) / (N - math.sqrt(N)) - s[0] / math.sqrt(N))


def plain_differences(particles, others, product, normalize):
    """q_i - q_j [Mi, Mj, G, D], s_i - s_j, s_i, inverse_norm"""
    s, inverse_norm = plain_rows(particles, others, normalize)
    q = s
    if product is not None:
        q = torch.cat([product.sum(0, keepdim=True) / (math.sqrt(len(s)) - 1), product])
    Mi = len(particles)
    first = 0 if others is None else Mi
    return q[:Mi, None] - q[None, first:], s[:Mi, None] - s[None, first:], s[:Mi], inverse_norm


def plain_pair_distances(particles, others, product, normalize):
    delta_q, delta_s, s, inverse_norm = plain_differences(particles, others, product, normalize)
    return (delta_q * delta_s).sum(-1).clamp(min=0), (delta_q * s[:, None]).sum(-1), inverse_norm


def plain_combine(particles, others, product, inverse_norm, coefficients, projection):
    Mi = len(particles)
    rows = particles if others is None else torch.cat([particles, others])
    s = rows * inverse_norm[..., None]
    delta_q = plain_differences(s[:Mi], None if others is None else s[Mi:], product, False)[0]
    gradient = (coefficients[..., None] * delta_q).sum(1) - projection[..., None] * s[:Mi]
    return gradient * inverse_norm[:Mi, :, None]


def cast(arguments, dtype):
    return [x.to(dtype) if isinstance(x, torch.Tensor) else x for x in arguments]


def check(ours, formula, *arguments):
    """ours is as good as formula(arguments) computed in plain PyTorch."""
    acc = torch.float64 if arguments[0].dtype == torch.float64 else torch.float32
    exact, plain = formula(*cast(arguments, torch.float64)), formula(*cast(arguments, acc))
    if isinstance(ours, torch.Tensor):
        ours, exact, plain = [ours], [exact], [plain]
    for got, good, rough in zip(ours, exact, plain, strict=True):
        assert got.shape == good.shape
        assert bool(got.isfinite().all())
        error, allowed = (got.double() - good).norm(), (rough.to(got.dtype).double() - good).norm()
        assert error <= 2 * allowed + 8 * torch.finfo(got.dtype).eps * good.norm()


def run_chain(particles, others, normalize=True, with_product=True):
    """All three operations, each checked on what the one before it gave; returns their results."""
    N = len(particles) + (0 if others is None else len(others))
    z = product = None
    if N > 1:
        z = repulsion.contrasts(particles, others, normalize, EPS)
        check(z, plain_contrasts, particles, others, normalize)
    if with_product and N > 1:
        product = z * torch.linspace(1, 0.1, z.shape[-1], dtype=z.dtype, device=DEVICE)  # C = diag
    results = repulsion.pair_distances(particles, others, product, normalize, EPS)
    check(results, plain_pair_distances, particles, others, product, normalize)
    d, alignment, inverse_norm = results
    if others is None:
        assert torch.equal(d, d.transpose(0, 1))
        assert not d.diagonal().any()
    coefficients = -(-d / (d.mean() + 1e-12)).exp() * (d > 0)
    projection = (coefficients * alignment).sum(1)
    arguments = (particles, others, product, inverse_norm, coefficients, projection)
    gradient = repulsion.combine(*arguments)
    assert gradient.dtype == particles.dtype
    assert gradient.is_contiguous()
    check(gradient, plain_combine, *arguments)
    return z, d, gradient


@pytest.mark.parametrize(("members", "others", "samples", "columns"), SHAPES)
def test_shapes(members, others, samples, columns):
    particles = make_rows("random", members, samples, columns)
    others = None if others is None else make_rows("random", others, samples, columns, seed=1)
    run_chain(particles, others, normalize=columns > 1, with_product=members != 3)


@pytest.mark.parametrize("kind", KINDS)
def test_hard_inputs(kind, path):
    particles = make_rows(kind, 5, 2, 7)
    run_chain(particles, None)
    run_chain(particles, None, with_product=False)
    run_chain(particles[:2], particles)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize(("members", "others"), [(5, None), (9, None), (2, 6)])
def test_types(dtype, members, others):
    particles = make_rows("random", members, 2, 24, dtype)
    others = None if others is None else make_rows("random", others, 2, 24, dtype, seed=1)
    acc = torch.float64 if dtype == torch.float64 else torch.float32
    z, d, _ = run_chain(particles, others)
    assert z.dtype == d.dtype == acc


def test_close_members_keep_relative_accuracy(path):
    """Unnormalised, so that the inputs' differences are exact: a Gram matrix would lose everything here."""
    particles = make_rows("close pair", 5, 2, 24)
    particles[-1] = particles[0] + 1e-6 * particles[-1]
    z = repulsion.contrasts(particles, None, False, EPS)
    for product in (None, z):
        d, _, _ = repulsion.pair_distances(particles, None, product, False, EPS)
        exact, _, _ = plain_pair_distances(particles.double(), None, None, False)
        tolerance = 1e-6 if product is None else 1e-5
        torch.testing.assert_close(d[0, 1:-1].double(), exact[0, 1:-1], rtol=tolerance, atol=0)
        if product is None:
            torch.testing.assert_close(d[0, -1].double(), exact[0, -1], rtol=tolerance, atol=0)

    close = particles[:1] + 1e-6 * make_rows("random", 5, 2, 24, seed=2)
    z = repulsion.contrasts(close, None, False, EPS)
    exact = plain_contrasts(close.double(), None, False)
    torch.testing.assert_close(z.double().norm(dim=-1), exact.norm(dim=-1), rtol=1e-5, atol=0)


def test_equal_rows_cancel_exactly(path):
    """A coefficient of 1/h = 1e12 must not find the rounding of two equal rows, nor a dead row overflow."""
    particles = make_rows("duplicated", 5, 2, 24)
    d, alignment, inverse_norm = repulsion.pair_distances(particles, None, None, True, EPS)
    assert not d[0, -1].any()
    assert not alignment[0, -1].any()
    coefficients = torch.zeros_like(d)
    coefficients[0, -1] = coefficients[-1, 0] = coefficients[1, 1] = 1e12
    zero = torch.zeros_like(inverse_norm)
    gradient = repulsion.combine(particles, None, None, inverse_norm, coefficients, zero)
    assert not gradient.any()
    gradient = repulsion.combine(particles, particles, None, inverse_norm.repeat(2, 1), coefficients, zero)
    assert not gradient.any()

    dead = torch.zeros_like(particles)
    d, _, inverse_norm = repulsion.pair_distances(dead, None, None, True, EPS)
    gradient = repulsion.combine(dead, None, None, inverse_norm, torch.full_like(d, 1e12), zero)
    assert torch.equal(inverse_norm, torch.full_like(zero, 1e12))
    assert not d.any()
    assert not gradient.any()


@pytest.mark.parametrize("others", [None, 2])
@pytest.mark.parametrize("split", [False, True])
def test_nan_reaches_every_distance_of_its_row(monkeypatch, path, others, split):
    if split:
        monkeypatch.setattr(tiles, "MANY_COLUMNS", 16)
    particles = make_rows("random", 3, 2, 80)
    particles[1, 0, 2] = math.nan
    others = None if others is None else make_rows("random", others, 2, 80, seed=1)
    d, _, inverse_norm = repulsion.pair_distances(particles, others, None, True, EPS)
    expected = torch.zeros_like(d, dtype=torch.bool)
    expected[1, :, 0] = True
    if others is None:
        expected[:, 1, 0] = True
        expected[1, 1, 0] = False
    assert torch.equal(d.isnan(), expected)
    assert int(inverse_norm.isnan().sum()) == 1


@pytest.mark.parametrize("others", [None, 1])
def test_columns_split_over_programs(monkeypatch, path, others):
    monkeypatch.setattr(tiles, "MANY_COLUMNS", 1024)
    particles = make_rows("duplicated", 5, 1, 1300)
    others = None if others is None else make_rows("random", others, 1, 1300, seed=1)
    assert tiles._splits(1, 1300, 512) == (3, 1)
    run_chain(particles, others)
    d, _, inverse_norm = repulsion.pair_distances(particles, others, None, True, EPS)
    assert inverse_norm[0] == inverse_norm[4]
    assert others is not None or d[0, 4] == 0


@pytest.mark.parametrize("symmetric", [False, True])
def test_sum_over_splits(symmetric):
    """More splits than a program loads at a time; torch's own sum adds different columns in different orders."""
    parts = make_rows("random", 69, 81, 2).view(69, 9, 9, 2)
    parts = (parts + parts.transpose(1, 2)).contiguous()
    total = repulsion._add_splits(parts, repulsion.tl.float32, symmetric=symmetric)
    torch.testing.assert_close(total.double(), parts.double().sum(0), rtol=1e-5, atol=1e-5)
    assert torch.equal(total, total.transpose(0, 1))


@pytest.mark.parametrize(("members", "others"), [(4, None), (3, 2)])
def test_strides(members, others):
    def spread(x, order):
        """The same numbers, laid out in another order with gaps around them."""
        wide = torch.full([n + 3 for n in x.permute(order).shape], math.nan, dtype=x.dtype, device=DEVICE)
        inner = wide[1:-2, 1:-2, 1:-2]
        inner.copy_(x.permute(order))
        return inner.permute([order.index(k) for k in range(3)])

    particles = make_rows("random", members, 3, 24)
    others = None if others is None else make_rows("random", others, 3, 24, seed=1)
    expected = run_chain(particles, others)
    for order in [(1, 0, 2), (2, 1, 0), (1, 2, 0)]:
        strided = spread(particles, order)
        assert not strided.is_contiguous()
        results = run_chain(strided, None if others is None else spread(others, order))
        for got, want in zip(results, expected, strict=True):
            torch.testing.assert_close(got, want)


@pytest.mark.parametrize("others", [None, 3])
def test_strides_of_the_other_arguments(others):
    particles = make_rows("random", 4, 3, 24)
    others = None if others is None else make_rows("random", others, 3, 24, seed=1)
    z = repulsion.contrasts(particles, others, True, EPS)
    _, d, _ = run_chain(particles, others)
    inverse_norm = plain_rows(particles, others, True)[1]
    arguments = [z, inverse_norm, d, d[:, 0]]
    expected = repulsion.combine(particles, others, *arguments)
    turned = [x.transpose(0, 1).contiguous().transpose(0, 1) for x in arguments]
    torch.testing.assert_close(repulsion.combine(particles, others, *turned), expected)
    wide = z.transpose(1, 2).contiguous().transpose(1, 2)
    for product in (turned[0], wide):
        got = repulsion.pair_distances(particles, others, product, True, EPS)
        torch.testing.assert_close(got, repulsion.pair_distances(particles, others, z, True, EPS))


def test_the_order_of_members_does_not_matter(path):
    particles = make_rows("random", 5, 2, 24)
    order = torch.randperm(5, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    results = []
    for rows in (particles, particles[order]):
        d, alignment, inverse_norm = repulsion.pair_distances(rows, None, None, True, EPS)
        gradient = repulsion.combine(rows, None, None, inverse_norm, -d, -(d * alignment).sum(1))
        z = repulsion.contrasts(rows, None, True, EPS)
        product = z * torch.linspace(1, 0.1, 24, dtype=z.dtype, device=DEVICE)
        results.append((d, gradient, repulsion.pair_distances(rows, None, product, True, EPS)[0]))
    (d, gradient, d_product), (d_2, gradient_2, d_product_2) = results
    assert torch.equal(d[order][:, order], d_2)
    torch.testing.assert_close(gradient[order], gradient_2, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(d_product[order][:, order], d_product_2, rtol=1e-5, atol=1e-6)


def test_others_that_are_the_particles():
    particles = make_rows("random", 4, 2, 24)
    d, alignment, _ = repulsion.pair_distances(particles, None, None, True, EPS)
    d_2, alignment_2, inverse_norm = repulsion.pair_distances(particles, particles.clone(), None, True, EPS)
    assert inverse_norm.shape == (8, 2)
    torch.testing.assert_close(d, d_2)
    torch.testing.assert_close(alignment, alignment_2)
    assert not d_2.diagonal().any()


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU: 4 GB of particles")
def test_more_than_two_to_the_31_numbers():
    particles = torch.randn(4, 1, 2**29 + 24, dtype=torch.bfloat16, device=DEVICE)
    d, _, _ = repulsion.pair_distances(particles, None, None, False, EPS)
    exact = (particles[0].double() - particles[3].double()).square().sum(-1)
    torch.testing.assert_close(d[0, 3].double(), exact, rtol=1e-5, atol=0)
