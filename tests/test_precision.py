"""Precision of the matrix products on CUDA: what tf32 costs, by its rounding done on the CPU, and the setting."""

import contextlib
import itertools
import sys

import pytest
import torch

import forde_fast as ff
from forde_fast import reference
from forde_fast.precision import PRECISIONS, matmul, products_in, terms
from forde_fast.strategies import Graphs, Strategy
from forde_fast.testing import make_particles, make_pca


def tf32(x):
    """To the nearest number of 11 bits."""
    return ((x.contiguous().view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)


def rounded_product(a, b, precision):
    """What a GPU makes of a @ b."""
    if precision == "ieee":
        return a @ b
    return sum(tf32(x) @ tf32(y) for x, y in terms(a, b, precision))


def error(x, exact):
    return float((x.double() - exact).norm() / exact.norm())


def test_three_products_of_halves_are_nearly_float32():
    a, b = torch.randn(30, 400), torch.randn(400, 20)
    exact = a.double() @ b.double()
    errors = [error(rounded_product(a, b, p), exact) for p in PRECISIONS]
    assert 1e-4 < errors[0] < 1e-3
    assert errors[1] < 4 * errors[2] < 4e-6


@pytest.mark.parametrize("kind", ["pca", "low rank"])
def test_tf32_costs_as_much_wherever_the_particles_are(kind, monkeypatch):
    scale = make_pca(300) if kind == "pca" else make_pca(300, 20, 0.01)
    for module in ("forde_fast.repulsion", "forde_fast.lengthscales.pca"):
        monkeypatch.setattr(sys.modules[module], "matmul", rounded_product)
    for case in ("random", "spread 1e-1", "spread 1e-3"):
        particles = make_particles(case, (10, 4, 300), 0, torch.float32)
        exact = reference.repulsion(particles.double(), scale)
        for precision, most in (("tf32", 2e-3), ("tf32x3", 3e-4), ("ieee", 3e-4)):
            result = ff.repulsion(particles, scale, backend="cpp", precision=precision)
            assert error(result.distances, exact.distances) < most
            assert error(result.gradient, exact.gradient) < 3 * most


def test_rows_as_they_are_would_be_noise_after_tf32():
    """Why the products are of contrasts: distances at spread 1e-3 from the product of the rows themselves."""
    scale, particles = make_pca(300), make_particles("spread 1e-3", (10, 4, 300), 0, torch.float32)
    basis = (scale.eigenvectors * scale.eigenvalues.sqrt()).float()
    x = rounded_product(torch.nn.functional.normalize(particles, dim=-1), basis, "tf32")
    d = (x[:, None] - x).square().sum(-1)
    assert error(d, reference.repulsion(particles.double(), scale).distances) > 0.05


def test_a_precision_is_a_name():
    with pytest.raises(ValueError, match=r"^precision: expected one of tf32, tf32x3, ieee, got 'half'"):
        ff.repulsion(torch.randn(3, 2, 4), precision="half")


def test_precision_means_nothing_on_a_cpu():
    a, b = torch.randn(3, 2, 5), torch.randn(5, 4)
    assert all(torch.equal(matmul(a, b, precision), a @ b) for precision in PRECISIONS)
    torch.library.opcheck(torch.ops.forde_fast.matmul, (a, b, "tf32"))


CUDA, MKLDNN, CONVOLUTIONS = torch.backends.cuda.matmul, torch.backends.mkldnn.matmul, torch.backends.cudnn.conv


def shown():
    """All that PyTorch tells of its precision; None for what it refuses to tell."""
    older = None
    with contextlib.suppress(RuntimeError):
        older = torch.get_float32_matmul_precision()
    return older, *(setting.fp32_precision for setting in (CUDA, MKLDNN, CONVOLUTIONS, torch.backends))


@pytest.fixture
def any_setting():
    """Leaves PyTorch as it is when it is imported."""
    yield
    torch.backends.fp32_precision = "none"
    torch.set_float32_matmul_precision("highest")
    CUDA.fp32_precision = MKLDNN.fp32_precision = "none"
    CONVOLUTIONS.fp32_precision = "tf32"


STATES = [
    *itertools.product(("highest", "high", "medium"), (None,), (None,), ("none",)),  # by the older setting alone
    *itertools.product(("highest", "high"), ("none", "ieee", "tf32"), ("none", "ieee", "bf16"), ("none", "tf32")),
]


@pytest.mark.parametrize("state", STATES, ids=str)
@pytest.mark.parametrize("precision", ["tf32", "ieee"])
def test_the_setting_is_left_as_it_was(state, precision, any_setting):
    older, cuda, cpu, general = state
    torch.set_float32_matmul_precision(older)
    CUDA.fp32_precision = CUDA.fp32_precision if cuda is None else cuda
    MKLDNN.fp32_precision = MKLDNN.fp32_precision if cpu is None else cpu
    torch.backends.fp32_precision = general
    before = shown()
    for convolutions in (True, False):
        with contextlib.suppress(KeyError), products_in(precision, convolutions):
            expected = "high" if precision == "tf32" else "highest"  # torch.compile may ask for it
            convolved = precision if convolutions else before[3]
            assert shown() == (expected, precision, precision, convolved, general)
            raise KeyError
        assert shown() == before
    if cuda != general:  # what the general setting stands for is not written down as the product's own
        torch.backends.fp32_precision = "none"
        assert CUDA.fp32_precision == (cuda or {"highest": "ieee"}.get(older, "tf32"))


def test_a_strategy_takes_any_setting(any_setting, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    ensemble, strategy = ff.Ensemble(lambda: torch.nn.Linear(2, 2), 2), Strategy(precision="tf32")
    graphs = Graphs(ensemble, ensemble.flat, None, torch.randn(3, 2), torch.zeros(3), None, strategy)
    CUDA.fp32_precision = "tf32"  # by the newer setting alone
    with graphs._running():
        assert shown() == ("high", "tf32", "tf32", "tf32", "none")
    assert shown() == (None, "tf32", "none", "tf32", "none")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_products_on_a_gpu():
    a, b = torch.randn(300, 400, device="cuda"), torch.randn(400, 200, device="cuda")
    exact = a.double() @ b.double()
    before = torch.backends.cuda.matmul.fp32_precision
    errors = [error(matmul(a, b, p), exact) for p in PRECISIONS]
    assert torch.backends.cuda.matmul.fp32_precision == before
    assert errors[0] < 1e-3
    assert errors[1] < 4e-6
    assert errors[2] < 1e-6
