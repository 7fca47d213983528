"""The operation inside autograd, torch.library and torch.compile; and what it says to bad input."""

import copy
import math

import pytest
import torch

import forde_fast as ff
from forde_fast.testing import make_pca

F64 = torch.float64


@pytest.fixture(params=["reference", "cpp"])
def backend(request):
    found = ff.available_backends()[request.param]
    if not found:
        pytest.skip(f"waits for the {request.param} backend: {found.reason}")
    return request.param


def test_gradcheck(backend):
    others, h = torch.randn(3, 2, 6, dtype=F64), torch.rand(3, 2, dtype=F64) + 0.5
    particles = torch.randn(4, 2, 6, dtype=F64, requires_grad=True)

    def value(p):
        return ff.repulsion(p, make_pca(6), others=others, bandwidth=h, backend=backend).value

    assert torch.autograd.gradcheck(value, particles)


def test_backward_is_the_gradient(backend):
    particles = torch.randn(4, 2, 6, requires_grad=True)
    result = ff.repulsion(particles, backend=backend)
    assert not result.gradient.requires_grad
    assert not result.bandwidth.requires_grad
    (3 * result.value).backward()
    assert torch.allclose(particles.grad, 3 * result.gradient)


def test_second_derivative_raises(backend):
    particles = torch.randn(4, 2, 6, requires_grad=True)
    (first,) = torch.autograd.grad(ff.repulsion(particles, backend=backend).value, particles, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiable once"):
        first.square().sum().backward()


def test_opcheck():
    if not ff.available_backends()["cpp"]:
        pytest.skip("waits for the cpp backend")
    operations = torch.ops.forde_fast
    particles, others = torch.randn(3, 4, 10), torch.randn(2, 4, 10)
    for given in (None, others):
        z = operations.contrasts(particles, given, True, 1e-24)
        d, alignment, norm = operations.pair_distances(particles, given, z, True, 1e-24)
        torch.library.opcheck(operations.contrasts, (particles, given, True, 1e-24))
        torch.library.opcheck(operations.pair_distances, (particles, given, z, True, 1e-24))
        arguments = (particles, given, z, norm, torch.rand_like(d), alignment[:, 0].contiguous())
        torch.library.opcheck(operations.combine, arguments)
        torch.library.opcheck(operations.coordinates, (particles, given, z[..., :3], True, 1e-24))
        torch.library.opcheck(operations.project, (particles, particles, given, torch.rand_like(d), True, 1e-24))
    torch.library.opcheck(operations.fused, (particles, None, True, 1e-24, 1.0))
    torch.library.opcheck(operations.fused_by_factor, (particles, torch.randn(10, 3), 0.1, True, 1e-24, 1.0))
    tracked = particles.requires_grad_()
    torch.library.opcheck(operations.attach_gradient, (tracked, torch.tensor(1.0), torch.randn(3, 4, 10)))


def test_compiled_program_is_the_same():
    def loss(particles):
        return ff.repulsion(particles * 2, backend="auto").value

    particles = torch.randn(4, 3, 10, requires_grad=True)
    eager = loss(particles)
    (wanted,) = torch.autograd.grad(eager, particles)
    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)(particles)
    (found,) = torch.autograd.grad(compiled, particles)
    assert torch.equal(eager, compiled)
    assert torch.equal(wanted, found)


SCALES = {
    "identity": None,
    "full": make_pca(300),
    "low rank": make_pca(300, 20, 0.01),
    "cosine": ff.Cosine.fit(torch.randn(9, 15, 20)),
}


@pytest.mark.parametrize("scale", SCALES.values(), ids=SCALES)
def test_compiled_before_its_first_use(scale):
    particles, compiled = torch.randn(4, 3, 300), torch.compile(ff.repulsion, backend="aot_eager", fullgraph=True)
    found = compiled(particles, copy.deepcopy(scale))
    wanted = ff.repulsion(particles, scale).gradient
    assert (found.gradient - wanted).norm() < 1e-6 * wanted.norm()


@pytest.mark.parametrize("scale", SCALES.values(), ids=SCALES)
def test_the_callers_autocast_changes_nothing(scale, backend):
    particles = torch.randn(4, 3, 300)
    exact = ff.repulsion(particles, scale, backend=backend)
    with torch.autocast("cpu", torch.bfloat16):
        found = ff.repulsion(particles, scale, backend=backend)
        d, state = ff.distances(particles, scale, backend=backend)
        mixed = ff.combine(state, torch.ones_like(d))
    assert torch.equal(found.gradient, exact.gradient)
    assert torch.equal(d, ff.distances(particles, scale, backend=backend)[0])
    assert mixed.dtype == torch.float32


def test_a_forward_derivative_is_refused():
    particles = torch.randn(4, 3, 300)
    with pytest.raises(RuntimeError, match=r"^particles: expected no forward-mode derivative"):
        torch.func.jvp(lambda p: ff.repulsion(p).value, (particles,), (torch.ones_like(particles),))


def test_what_is_made_in_inference_mode_serves_later_calls():
    scale, particles = copy.deepcopy(SCALES["cosine"]), torch.randn(4, 3, 300)
    with torch.inference_mode():
        first = ff.repulsion(particles, scale).gradient
    later = ff.repulsion(particles, scale, backend="reference").gradient
    assert (later - first).norm() < 1e-5 * first.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bandwidth", ["median", 0.5, torch.rand(4, 3) + 0.1], ids=["median", "number", "tensor"])
def test_the_reference_differentiates_in_inference_mode(dtype, bandwidth):
    particles, others, scale = torch.randn(4, 3, 10).to(dtype), torch.randn(4, 3, 10).to(dtype), make_pca(10)
    keywords = {"others": others, "backend": "reference"}
    wanted = ff.repulsion(particles, scale, bandwidth=bandwidth, **keywords)
    weighed = ff.combine(ff.distances(particles, scale, **keywords)[1], c := torch.randn(4, 4, 3))
    with torch.inference_mode():
        made = particles.clone()
        keywords["others"] = others.clone()
        h = bandwidth.clone() if isinstance(bandwidth, torch.Tensor) else bandwidth
        found = ff.repulsion(made, scale, bandwidth=h, **keywords)
        assert torch.equal(ff.combine(ff.distances(made, scale, **keywords)[1], c.clone()), weighed)
    later = ff.repulsion(made, scale, bandwidth=h, **keywords)  # of tensors made there
    assert all(map(torch.equal, found, wanted))
    assert all(map(torch.equal, later, wanted))


def test_a_bandwidth_tensor_compiles():
    particles, bandwidth = torch.randn(4, 3, 10), torch.rand(4, 3) + 0.1
    compiled = torch.compile(ff.repulsion, backend="aot_eager", fullgraph=True)
    found, wanted = (call(particles, bandwidth=bandwidth, backend="cpp") for call in (compiled, ff.repulsion))
    assert all(map(torch.equal, found, wanted))


GOOD = torch.randn(3, 4, 10)
BAD = [
    ({"particles": [[1.0]]}, TypeError, "particles: expected a torch.Tensor"),
    (
        {"particles": torch.randn(3, 4, 10).to_sparse()},
        TypeError,
        "particles: expected a dense tensor, got torch.spar",
    ),
    ({"particles": torch.randn(3, 4)}, ValueError, r"particles: expected 3 dimensions \[M, G, D\]"),
    ({"particles": torch.randn(0, 4, 10)}, ValueError, "particles: expected at least one of each of M, G, D"),
    ({"particles": torch.ones(3, 4, 10, dtype=torch.int64)}, TypeError, "particles: expected float32"),
    ({"particles": torch.randn(3, 4, 10, dtype=torch.complex64)}, TypeError, "particles: expected float32"),
    ({"lengthscale": make_pca(11)}, ValueError, "particles: expected D = 11 as the lengthscale, got 10"),
    ({"others": torch.randn(3, 4, 10, dtype=F64)}, ValueError, "others: expected dtype torch.float32"),
    ({"others": torch.randn(3, 4, 10, device="meta")}, ValueError, "others: expected device cpu"),
    ({"others": torch.randn(3, 5, 10)}, ValueError, r"others: expected shape \[N, 4, 10\]"),
    ({"backend": "cudnn"}, ValueError, "backend: expected one of auto, reference, cpp, triton, cuda, got 'cudnn'"),
    ({"bandwidth": "mean"}, ValueError, "bandwidth: expected 'median'"),
    ({"bandwidth": -1.0}, ValueError, "bandwidth: expected a finite number > 0, got -1.0"),
    ({"bandwidth": torch.ones(2, 4)}, ValueError, r"bandwidth: expected a shape that broadcasts to \[3, 4\]"),
    ({"bandwidth": torch.zeros(4)}, ValueError, "bandwidth: expected finite values > 0"),
    ({"bandwidth": torch.tensor(math.inf)}, ValueError, "bandwidth: expected finite values > 0, got inf"),
    ({"eps": 0.0}, ValueError, "eps: expected a finite number > 0, got 0.0"),
]


@pytest.mark.parametrize(("arguments", "error", "message"), BAD, ids=[m for *_, m in BAD])
def test_bad_arguments(arguments, error, message):
    with pytest.raises(error, match=message) as caught:
        ff.repulsion(**{"particles": GOOD, **arguments})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("members", [1, 3])
@pytest.mark.parametrize("normalize", [True, False])
def test_not_finite(bad, members, normalize, backend):
    particles = torch.randn(members, 4, 10)
    particles[-1, 2, 5] = bad
    with pytest.raises(
        ValueError, match=rf"particles: expected finite numbers, got {bad} at \[{members - 1}, 2, 5\]"
    ):
        ff.repulsion(particles, normalize=normalize, backend=backend)
    with pytest.raises(ValueError, match="others: expected finite numbers"):
        ff.repulsion(torch.randn(2, 4, 10), others=particles, normalize=normalize, backend=backend)


def test_a_backend_asked_for_by_name_never_falls_back(monkeypatch):
    from forde_fast import operators

    monkeypatch.setitem(operators.UNUSABLE, "cpp", "no compiler was found")
    monkeypatch.setitem(operators.UNUSABLE, "triton", "no CUDA device")
    assert not ff.available_backends()["cpp"]
    assert str(ff.available_backends()["cpp"]) == "no compiler was found"
    for name, reason in (("cpp", "no compiler was found"), ("triton", "no CUDA device")):
        with pytest.raises(RuntimeError, match=f"not '{name}', got {reason}"):
            ff.repulsion(GOOD, backend=name)
    assert ff.repulsion(GOOD, backend="auto").value == ff.repulsion(GOOD, backend="reference").value
