"""Every method against slow, direct formulas in float64: loops over members, gradients by autograd."""

import copy
import math
import statistics
from collections import OrderedDict
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import forde_fast as ff
from forde_fast.eigen import directions, jacobi
from forde_fast.methods import METHODS, NAMES, SHARED, make
from forde_fast.rules import GAL, LIT, SGE
from forde_fast.step import Objective, gradient, init
from forde_fast.strategies import LOOP, Strategy

F64 = torch.float64
GOLDEN = Path(__file__).parent / "golden"
B, K, W = 6, 4, 2.5
STRATEGIES = {"loop": LOOP, "stacked": Strategy("stacked"), "one by one": Strategy(members_at_a_time=1)}


def net():
    layers = {"flatten": nn.Flatten(), "linear": nn.Linear(12, 7), "norm": nn.BatchNorm1d(7), "gelu": nn.GELU()}
    return nn.Sequential(OrderedDict(layers, head=nn.Linear(7, K)))


def setup(members=4, shared=()):
    return (
        ff.Ensemble(net, members, shared=shared).double(),
        torch.randn(B, 3, 2, 2, dtype=F64),
        torch.randint(K, (B,)),
    )


def relative(x, exact):
    return float((x - exact).norm() / exact.norm())


def flat_gradient(value, member):
    gradients = torch.autograd.grad(value, list(member.parameters()), materialize_grads=True)
    return torch.cat([g.flatten() for g in gradients])


# ---------------------------------------------------------------- the formulas


def kernel_update(particles, sge=None):
    """[M, D]: sum_j grad_i k_ij / sum_j k_ij, or (K + 0.01 I)^-1 times the rows sum_j grad_i k_ij."""
    members = len(particles)
    squares = [[float((a - b).square().sum()) for b in particles] for a in particles]
    h = statistics.median(d for row in squares for d in row) / math.log(members + 1) + 1e-12
    kernel = torch.tensor([[math.exp(-d / h) for d in row] for row in squares], dtype=F64)
    rows = [
        sum(-2 / h * kernel[i, j] * (particles[i] - particles[j]) for j in range(members)) for i in range(members)
    ]
    if sge:
        return torch.linalg.inv(kernel + 0.01 * torch.eye(members, dtype=F64)) @ torch.stack(rows)
    return torch.stack([row / kernel[i].sum() for i, row in enumerate(rows)])


def by_weights(ensemble, x, y, sge=False):
    update = kernel_update(ensemble.flat, sge)
    rows = [flat_gradient(F.cross_entropy(m(x), y), m) + W * u for m, u in zip(ensemble.members, update, strict=True)]
    return torch.stack(rows)


def by_outputs(ensemble, x, y, sge=False, probabilities=False, prior=1e-6):
    outputs = [member(x) for member in ensemble.members]
    values = [o.softmax(1) if probabilities else o for o in outputs]
    update = kernel_update(torch.stack([v.detach().flatten() for v in values]), sge)
    rows = []
    for member, o, v, u in zip(ensemble.members, outputs, values, update, strict=True):
        cotangent = W * u.view_as(v) + 2 * prior * v.detach() / (1 + prior * v.detach() ** 2)
        rows.append(flat_gradient(F.cross_entropy(o, y) + (v * cotangent).sum() / B, member))
    return torch.stack(rows)


def feature_update(features, slopes, count, prior, weight=1.0):
    """Prior and repulsion on features [M, B, F], before the division by B, and the directions from slopes."""
    rows = slopes.flatten(1)
    values, vectors = torch.linalg.eigh(rows @ rows.T)
    e = torch.stack([(vectors[:, q] / values[q].sqrt()) @ rows for q in range(count)])
    z = features.flatten(1) @ e.T
    update = []
    for p in range(len(z)):
        d = [float((z[p] - other).square().sum()) for other in z]
        h = statistics.median(d) ** 2 / math.log(len(z)) + 1e-12
        k = [math.exp(-one / h) for one in d]
        g = sum(-2 / h * k[q] * (z[p] - z[q]) for q in range(len(z))) / sum(k)
        update.append((g @ e).view_as(features[p]))
    return 2 * prior * features / (1 + prior * features**2) + weight * torch.stack(update)


def by_features(ensemble, x, y, prior=5e-3):
    """With a shared last layer, whose gradient is the members' mean."""
    features = [member[:-1](x) for member in ensemble.members]
    losses = [F.cross_entropy(member.head(f), y) for member, f in zip(ensemble.members, features, strict=True)]
    slopes = [
        B * torch.autograd.grad(loss, f, retain_graph=True)[0] for loss, f in zip(losses, features, strict=True)
    ]
    update = feature_update(torch.stack(features).detach(), torch.stack(slopes), 4, prior, W)
    rows = []
    for member, f, loss, u in zip(ensemble.members, features, losses, update, strict=True):
        rows.append(flat_gradient(loss + (f * u).sum() / B, member))
    g, head = torch.stack(rows), sum(p.numel() for p in ensemble.member(0).head.parameters())
    g[:, -head:] = g[:, -head:].mean(0)
    return g


def by_cosines(ensemble, x, y, gal=False):
    x = x.clone().requires_grad_()
    losses = [F.cross_entropy(member(x), y) for member in ensemble.members]
    slopes = [torch.autograd.grad(B * loss, x, create_graph=True)[0].flatten(1) for loss in losses]
    pairs = [(i, j) for i in range(len(slopes)) for j in range(i)]
    cosines = torch.stack([F.cosine_similarity(slopes[i], slopes[j], dim=1) for i, j in pairs])  # [pairs, B]
    penalty = cosines.exp().sum(0).log().mean() if gal else 0.01 * cosines.square().sum(0).mean()
    total = sum(losses) + W * penalty
    return torch.stack([flat_gradient_of(total, m) for m in ensemble.members])


def flat_gradient_of(total, member):
    gradients = torch.autograd.grad(total, list(member.parameters()), retain_graph=True, materialize_grads=True)
    return torch.cat([g.flatten() for g in gradients])


FORMULAS = {
    "weight-rde": by_weights,
    "weight-rde-sge": lambda *given: by_weights(*given, sge=True),
    "function-rde": by_outputs,
    "function-rde-sge": lambda *given: by_outputs(*given, sge=True),
    "function-rde-probabilities": lambda *given: by_outputs(*given, probabilities=True, prior=0.0),
    "feature-rde": by_features,
    "lit": by_cosines,
    "gal": lambda *given: by_cosines(*given, gal=True),
}


@pytest.mark.parametrize("strategy", STRATEGIES.values(), ids=STRATEGIES)
@pytest.mark.parametrize("name", FORMULAS)
def test_gradient_is_the_formulas(name, strategy):
    ensemble, x, y = setup(shared=SHARED.get(name, ()))
    objective = Objective(METHODS[name], repulsion_weight=W)
    buffers = init(ensemble).buffers
    found, log = gradient(ensemble, ensemble.flat, buffers, x, y, objective, True, strategy)
    exact = FORMULAS[name](ensemble, x, y)
    plain, _ = gradient(ensemble, ensemble.flat, init(ensemble).buffers, x, y, Objective(METHODS["de"]))
    assert relative(found, exact) < 1e-8
    assert relative(found - plain, exact - plain) < 1e-6  # what is not the deep ensemble's
    assert all(torch.isfinite(number) for number in log)


def test_every_name_but_de_and_forde_has_a_formula():
    assert set(FORMULAS) | {"de", "forde"} == set(METHODS)


@pytest.mark.parametrize("backend", ["reference", "cpp"])
@pytest.mark.parametrize("members", [2, 5, 10])
def test_published_kernel_updates(members, backend):
    if not ff.available_backends()[backend]:
        pytest.skip(f"waits for the {backend} backend")
    stored = np.load(GOLDEN / "weight_function_rde.npz")
    particles = torch.from_numpy(stored[f"m{members}_particles"])[:, None]
    for name, key in (("weight-rde", "kde"), ("weight-rde-sge", "sge")):
        rule = METHODS[name].bandwidth
        found = ff.repulsion(particles, normalize=False, bandwidth=rule, backend=backend).gradient[:, 0]
        assert relative(found, torch.from_numpy(stored[f"m{members}_{key}"])) < 1e-8


def test_published_feature_update():
    stored = {name: torch.from_numpy(array) for name, array in np.load(GOLDEN / "feature_rde.npz").items()}
    features, labels = stored["features"], stored["labels"]
    batch, prior, count = len(labels), float(stored["prior_scale"]), int(stored["directions"])

    class Head(nn.Module):
        """A member whose features are its own parameters."""

        def __init__(self, own):
            super().__init__()
            self.own, self.head = nn.Parameter(own.clone()), nn.Linear(12, 4)
            self.head.weight.data, self.head.bias.data = stored["weight"].T.clone(), stored["bias"].clone()

        def forward(self, x):
            return self.head(self.own)

    ensemble = ff.Ensemble.from_modules([Head(own) for own in features], shared="head")
    method = replace(METHODS["feature-rde"], prior=ff.methods.Cauchy(prior), space=ff.Features(count))
    x = torch.zeros(batch, 1, dtype=F64)
    g, _ = gradient(ensemble, ensemble.flat, init(ensemble).buffers, x, labels, Objective(method))
    own = g[:, : features[0].numel()].view_as(features)
    assert relative(own, stored["feature_gradient"]) < 1e-8


# ---------------------------------------------------------------- rules


@pytest.mark.parametrize("members", [1, 2, 3, 7])
@pytest.mark.parametrize("rule", [LIT(), GAL()], ids=["LIT", "GAL"])
def test_coefficients_are_those_of_the_values_derivative(rule, members):
    """Each pair's distance stands in d twice, as the value has it once."""
    s = F.normalize(torch.randn(members, 3, 5, dtype=F64), dim=-1).requires_grad_()
    cosine = torch.einsum("igd,jgd->ijg", s, s)
    value, c, h = rule.apply((2 - 2 * cosine).detach())
    pairs = torch.ones(members, members).triu(1).bool()
    if members == 1:
        exact = torch.zeros((), dtype=F64) * s.sum()
    elif isinstance(rule, LIT):
        exact = cosine[pairs].square().sum() / 3
    else:
        exact = cosine[pairs].exp().sum(0).log().mean()
    assert torch.allclose(value, exact, rtol=1e-12, atol=1e-14)
    found = torch.einsum("ijg,ijgd->igd", c, (s[:, None] - s[None]).detach())
    (slope,) = torch.autograd.grad(exact, s)
    tangent = slope - (slope * s).sum(-1, keepdim=True) * s  # along the sphere, where all particles are
    on_sphere = found - (found * s).sum(-1, keepdim=True) * s
    assert torch.allclose(on_sphere, tangent, rtol=1e-10, atol=1e-12)
    assert h.shape == (members, 3)


@pytest.mark.parametrize("rule", [LIT(), GAL(), SGE()], ids=["LIT", "GAL", "SGE"])
def test_backends_agree_on_rules_and_take_no_others(rule):
    particles = torch.randn(4, 5, 300)
    results = [
        ff.repulsion(particles, bandwidth=rule, backend=backend)
        for backend, usable in ff.available_backends().items()
        if usable and backend in ("reference", "cpp")
    ]
    for one in results:
        assert relative(one.gradient, results[0].gradient) < 1e-5
        assert torch.allclose(one.value, results[0].value)
    for others in (particles[:2], torch.randn_like(particles)):
        with pytest.raises(ValueError, match=r"^others: expected none for this rule"):
            ff.repulsion(particles, bandwidth=rule, others=others)


def test_alike_members_are_finite_and_not_moved():
    for rule in (LIT(), GAL(), SGE(), METHODS["weight-rde"].bandwidth):
        result = ff.repulsion(torch.ones(3, 2, 300), bandwidth=rule)
        assert torch.isfinite(result.value)
        assert (result.gradient.abs() < 1e-6).all()


# ---------------------------------------------------------------- directions


@pytest.mark.parametrize("size", [1, 2, 3, 6, 9, 20])
def test_jacobi_diagonalises(size):
    rows = torch.randn(size, size + 3, dtype=F64)
    matrix = rows @ rows.T
    values, vectors = jacobi(matrix)
    assert torch.allclose(values, torch.linalg.eigvalsh(matrix), rtol=1e-10, atol=1e-10)
    assert torch.allclose(vectors @ torch.diag(values) @ vectors.T, matrix, atol=1e-10)
    assert torch.allclose(vectors.T @ vectors, torch.eye(size, dtype=F64), atol=1e-12)


def test_directions_are_orthonormal_and_those_of_no_length_are_zero():
    rows = torch.randn(5, 40, dtype=F64)
    for largest in (False, True):
        kept = directions(rows, 3, largest)
        assert torch.allclose(kept @ kept.T, torch.eye(3, dtype=F64), atol=1e-10)
        assert relative(kept, kept @ rows.T @ torch.linalg.inv(rows @ rows.T) @ rows) < 1e-10  # within their span
    spread = [float((rows @ directions(rows, 2, largest).T).norm()) for largest in (False, True)]
    assert spread[0] < spread[1]
    rows[3] = rows[1]
    assert directions(rows, 1).abs().max() == 0


# ---------------------------------------------------------------- weight 0, sharing, names


@pytest.mark.parametrize("name", [name for name in METHODS if name != "de"])
def test_without_weight_every_method_is_the_deep_ensemble(name):
    ensemble = ff.Ensemble(ff.models.cnn, 3)
    twin = copy.deepcopy(ensemble)
    trainers = [ff.Trainer(ensemble, name, repulsion_weight=0), ff.Trainer(twin, "de")]
    for _ in range(3):
        x, y = torch.randn(8, 1, 8, 8), torch.randint(10, (8,))
        for trainer in trainers:
            trainer.step(x, y)
    for (key, one), other in zip(ensemble.state_dict().items(), twin.state_dict().values(), strict=True):
        assert torch.equal(one, other), key


@pytest.mark.parametrize("optimizer", [None, lambda parameters: torch.optim.Adam(parameters, lr=1e-2)])
def test_shared_layers_stay_the_same_and_move_by_the_mean(optimizer):
    ensemble = ff.Ensemble(net, 3, shared="head")
    start = ensemble.member(0).head.weight.clone()
    assert not torch.equal(ensemble.member(0).linear.weight, ensemble.member(1).linear.weight)
    trainer = ff.Trainer(ensemble, "feature-rde", optimizer=optimizer)
    for _ in range(3):
        trainer.step(torch.randn(B, 3, 2, 2), torch.randint(K, (B,)))
    for member in ensemble.members:
        assert torch.equal(member.head.weight, ensemble.member(0).head.weight)
        assert torch.equal(member.head.bias, ensemble.member(0).head.bias)
    assert not torch.equal(ensemble.member(0).head.weight, start)


def test_names_are_made_from_images():
    images = torch.randn(40, 1, 4, 4)
    for name in NAMES:
        method = make(name, images, alpha=0.5)
        assert isinstance(method, ff.Method)
        ensemble = ff.Ensemble(lambda: ff.models.mlp(3, (1, 4, 4), (5,)), 2, shared=SHARED.get(name, ()))
        log = ff.Trainer(ensemble, method).step(images[:8], torch.randint(3, (8,)))
        assert (log.repulsion != 0) == (name != "de")
    assert make("weight-rde", images).weight == 1 / 40
    assert make("feature-rde", images, data="cifar10").prior.scale == 1e-3
    assert torch.equal(make("forde-tuned", images, 1.0).lengthscale.eigenvalues, ff.PCA.fit(images).eigenvalues)


def test_a_methods_own_lengthscale_is_the_trainers():
    images = torch.randn(30, 1, 4, 4)
    scale = ff.PCA.fit(images)
    ensembles = [ff.Ensemble(lambda: ff.models.mlp(3, (1, 4, 4), (5,)), 3) for _ in range(2)]
    ff.Trainer(ensembles[0], ff.Method(ff.InputGradients(), lengthscale=scale)).step(images, torch.ones(30).long())
    ff.Trainer(ensembles[1], "forde", scale).step(images, torch.ones(30).long())
    assert torch.equal(ensembles[0].flat, ensembles[1].flat)


def test_what_a_space_needs_is_said_at_once():
    members = [nn.Linear(3, 2), nn.Linear(3, 2, bias=False)]
    with pytest.raises(ValueError, match=r"^ensemble: expected members of the same parameters"):
        ff.Trainer(ff.Ensemble.from_modules(members), "weight-rde")
    with pytest.raises(ValueError, match=r"^layer: expected a layer of modules\[0\], with the last one, got head"):
        ff.Trainer(ff.Ensemble.from_modules(members[:1]), "feature-rde")
    with pytest.raises(
        ValueError, match=r"^shared: expected the name of a layer with trainable parameters, got 'hea'"
    ):
        ff.Ensemble(net, 2, shared="hea")
    with pytest.raises(ValueError, match=r"^method: expected 'forde' and its lengthscale, .* got 'forde-pca'"):
        ff.Trainer(ff.Ensemble(net, 2), "forde-pca")
    with pytest.raises(ValueError, match=r"^method: expected one of de, forde, weight-rde"):
        ff.Trainer(ff.Ensemble(net, 2), "rde")
    with pytest.raises(ValueError, match=r"^weight: expected a finite number >= 0"):
        ff.Method(None, weight=-1)


def test_a_users_own_space_and_lengthscale():
    """As the README shows them."""
    weights = torch.linspace(0.1, 2.0, 12)

    def saliency(forward, x, y):
        outputs, particles = ff.InputGradients()(forward, x, y)
        return outputs, particles.abs()

    class Centre:
        dimension = None

        def coordinates(self, s):
            return s * weights.to(s).sqrt()

        def product(self, s):
            return s * weights.to(s)

    method = ff.Method(saliency, bandwidth=ff.Median(over="sample"))
    ensemble, x, y = setup(3)
    results = []
    for backend in ("reference", "auto"):
        objective = Objective(method, Centre(), W, backend=backend)
        results.append(gradient(ensemble, ensemble.flat, init(ensemble).buffers, x, y, objective))
    assert relative(results[1][0], results[0][0]) < 1e-8
    assert torch.allclose(results[1][1].repulsion, results[0][1].repulsion)


def test_pca_of_large_images_is_of_low_rank(monkeypatch):
    monkeypatch.setattr("forde_fast.methods.WHOLE_PCA", 20)
    monkeypatch.setattr("forde_fast.methods.RANK", 3)
    images = torch.randn(40, 1, 5, 5)
    for given, side, rank in ((None, 5, 3), (None, 4, 16), (7, 5, 7)):
        scale = make("forde-pca", images[..., :side, :side], rank=given).lengthscale
        assert scale.rank == rank
        assert (scale.tail > 0) == (rank < side**2)
