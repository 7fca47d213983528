"""The trainer: the published run, plain PyTorch where there is no repulsion, the pull-back, what comes in."""

import copy
import inspect
import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import forde_fast as ff
from forde_fast import reference
from forde_fast.testing import make_pca
from forde_fast.trainer import MEASURED, SGD, Objective, gradient, init, published_schedule, update

F32, F64 = torch.float32, torch.float64
GOLDEN = np.load(Path(__file__).parent / "golden" / "trajectory.npz")


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """In networks this small, threads only wait for each other: on a busy machine for minutes."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def relative(x, exact):
    return float((x - exact).norm() / exact.norm())


def net(dropout=0.0, width=8):
    return nn.Sequential(
        nn.Flatten(), nn.Linear(12, width), nn.BatchNorm1d(width), nn.ReLU(), nn.Dropout(dropout),
        nn.Linear(width, 4),
    )  # fmt: skip


def batch(size=6, dtype=F32):
    return torch.randn(size, 3, 2, 2, dtype=dtype), torch.randint(4, (size,))


def batches(count, size=6):
    return [batch(size) for _ in range(count)]


def state_of(ensemble):
    return {name: tensor.clone() for name, tensor in ensemble.state_dict().items()}


def same_state(ensemble, state):
    return all(torch.equal(tensor, state[name]) for name, tensor in ensemble.state_dict().items())


# ---------------------------------------------------------------- the published run


class Published(nn.Module):
    def __init__(self, eps):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(8, eps=eps)
        self.conv2 = nn.Conv2d(8, 12, 3, stride=2, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(12, eps=eps)
        self.head = nn.Linear(12, 5)

    def forward(self, x):
        x = self.bn1(self.conv1(x)).relu()
        return self.head(self.bn2(self.conv2(x)).relu().mean((2, 3)))


def golden(what):
    return torch.from_numpy(GOLDEN[what])


def published_parameters(which):
    """{name in PyTorch: [M, ...]} of 'start', 'grad0' or 'end'."""
    names = [name for name, _ in Published(1e-5).named_parameters()]
    stored = [n.removesuffix(".weight") if "conv" in n else n.replace(".", "_") for n in names]
    return {name: golden(f"{which}_{key}") for name, key in zip(names, stored, strict=True)}


def published_trainer(backend):
    if not ff.available_backends()[backend]:
        pytest.skip(f"waits for the {backend} backend")
    members = [Published(float(golden("bn_eps"))).double() for _ in range(4)]
    for i, member in enumerate(members):
        member.load_state_dict({n: p[i] for n, p in published_parameters("start").items()}, strict=False)
    return ff.Trainer(
        ff.Ensemble.from_modules(members),
        lengthscale=ff.PCA(golden("eigenvectors"), golden("eigenvalues")),
        eps=float(golden("eps")),
        backend=backend,
        lr=float(golden("lr")),
        momentum=float(golden("momentum")),
        weight_decay=float(golden("weight_decay")),
    )


def assert_members_have(ensemble, rows, which, tolerance):
    """rows [M, P], as the published run's parameters."""
    for i, row in enumerate(rows):
        named = list(ensemble.member(i).named_parameters())
        pieces = row.split([p.numel() for _, p in named])
        for (name, p), piece in zip(named, pieces, strict=True):
            exact = published_parameters(which)[name][i]
            assert relative(piece.view(p.shape), exact) < tolerance, (i, name)


@pytest.mark.parametrize("backend", ["reference", "cpp"])
def test_published_run_of_ten_steps(backend):
    trainer = published_trainer(backend)
    ensemble = trainer.ensemble
    images, labels = golden("images"), golden("labels")
    g, _ = gradient(ensemble, ensemble.flat, init(ensemble).buffers, images[0], labels[0], trainer.objective)
    assert_members_have(ensemble, g + float(golden("weight_decay")) * ensemble.flat, "grad0", 1e-9)
    for x, y, wanted in zip(images, labels, golden("log"), strict=True):
        log = trainer.step(x, y)
        found = torch.stack([log.cross_entropy, log.repulsion, log.bandwidth_median])
        assert torch.allclose(found, wanted, rtol=1e-8)
    assert_members_have(ensemble, ensemble.flat, "end", 1e-8)


def test_defaults_are_the_published_ones():
    defaults = {name: p.default for name, p in inspect.signature(ff.Trainer).parameters.items()}
    published = {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 5e-4, "repulsion_weight": 1.0}
    assert {"eps": 1e-24, "method": "forde", **published}.items() <= defaults.items()
    assert SGD() == SGD(0.1, 0.9, True, 5e-4)


# ---------------------------------------------------------------- no repulsion: plain PyTorch


def plain_loop(models, data, rates=None, **sgd):
    """M ordinary training loops."""
    sgd = {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 5e-4} | sgd
    optimizers = [torch.optim.SGD(model.parameters(), **sgd) for model in models]
    for (x, y), rate in zip(data, rates or itertools.repeat(1.0), strict=rates is not None):
        for model, optimizer in zip(models, optimizers, strict=True):
            optimizer.param_groups[0]["lr"] = sgd["lr"] * rate
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
    return models


def assert_same_networks(ensemble, models):
    for member, model in zip(ensemble.members, models, strict=True):
        for (name, one), other in zip(member.state_dict().items(), model.state_dict().values(), strict=True):
            assert torch.equal(one, other), name


OPTIMISERS = [{}, {"nesterov": False}, {"momentum": 0.0, "nesterov": False}, {"weight_decay": 0.0, "lr": 0.3}]


@pytest.mark.parametrize("sgd", OPTIMISERS, ids=str)
@pytest.mark.parametrize("method", ["de", "forde"])
def test_one_member_is_a_plain_loop(sgd, method):
    data = batches(6)
    torch.manual_seed(11)
    model = net(dropout=0.3)
    trainer = ff.Trainer(ff.Ensemble(lambda: net(dropout=0.3), 1, seed=11), method, **sgd)
    torch.manual_seed(5)
    plain_loop([model], data, **sgd)
    torch.manual_seed(5)
    for x, y in data:
        log = trainer.step(x, y)
        assert log.repulsion == log.gradient_ratio == log.dead_rows == 0
    assert_same_networks(trainer.ensemble, [model])


@pytest.mark.parametrize("options", [{"method": "de"}, {"repulsion_weight": 0}], ids=str)
def test_without_repulsion_members_are_independent_plain_loops(options):
    ensemble = ff.Ensemble(lambda: net(dropout=0.3), 3, seed=2)
    models = [copy.deepcopy(member) for member in ensemble.members]
    data, trainer = batches(6), ff.Trainer(ensemble, **options)
    torch.manual_seed(5)
    plain_loop(models, data)
    torch.manual_seed(5)
    logs = [trainer.step(x, y) for x, y in data]
    assert_same_networks(ensemble, models)
    for log in logs:
        assert all(value == 0 for value in log[1:])


def test_logged_cross_entropy_is_summed_over_members():
    ensemble = ff.Ensemble(net, 3)
    x, y = batch()
    wanted = sum(F.cross_entropy(copy.deepcopy(member)(x), y) for member in ensemble.members)
    assert torch.allclose(ff.Trainer(ensemble).step(x, y).cross_entropy, wanted)


# ---------------------------------------------------------------- the functional core


@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_update_is_the_trainers_step_and_changes_nothing_else(dropout):
    ensemble = ff.Ensemble(lambda: net(dropout), 3)
    trainer = ff.Trainer(copy.deepcopy(ensemble), repulsion_weight=3.0, lr=0.05, accelerate=False)
    state, kept = init(ensemble), state_of(ensemble)
    for step, (x, y) in enumerate(batches(12)):
        before = copy.deepcopy(state)
        torch.manual_seed(step)
        new, log = update(state, x, y, ensemble, trainer.objective, trainer.sgd)
        torch.manual_seed(step)
        wanted = trainer.step(x, y)
        assert torch.equal(state.parameters, before.parameters)
        assert torch.equal(state.velocity, before.velocity)
        assert state.step == before.step == step
        for own, old in zip(state.buffers, before.buffers, strict=True):
            assert all(torch.equal(own[name], old[name]) for name in old)
        assert torch.equal(new.parameters, trainer.ensemble.flat)
        assert torch.equal(new.velocity, trainer.velocity)
        for own, member in zip(new.buffers, trainer.ensemble.members, strict=True):
            assert all(torch.equal(own[name], b) for name, b in member.named_buffers())
        if step % 10:
            wanted = wanted._replace(**dict.fromkeys(MEASURED, torch.zeros(())))
        assert all(torch.equal(a, b) for a, b in zip(log, wanted, strict=True))
        state = new
    assert same_state(ensemble, kept)


def test_init_copies():
    ensemble = ff.Ensemble(net, 2)
    state, kept = init(ensemble), state_of(ensemble)
    state.parameters.zero_()
    state.buffers[0]["2.running_mean"].fill_(7)
    assert same_state(ensemble, kept)


# ---------------------------------------------------------------- the pull-back


class TransformerBlock(nn.Module):
    """Four tokens of three; attention by the fused operation, which has no second derivative of its own."""

    def __init__(self, dropout=0.0):
        super().__init__()
        self.embed, self.norm1, self.norm2 = nn.Linear(3, 8), nn.LayerNorm(8), nn.LayerNorm(8)
        self.attention = nn.MultiheadAttention(8, 2, dropout=dropout, batch_first=True)
        self.feed = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Dropout(dropout), nn.Linear(16, 8))
        self.head = nn.Linear(8, 4)

    def forward(self, x):
        x = self.embed(x.flatten(2).mT)
        z = self.norm1(x)
        x = x + self.attention(z, z, z, need_weights=False)[0]
        return self.head((x + self.feed(self.norm2(x))).mean(1))


def separable(norm):
    return nn.Sequential(
        nn.Conv2d(3, 6, 1), nn.Conv2d(6, 6, 3, padding=1, groups=6, bias=False), norm(6), nn.SiLU(),
        nn.Conv2d(6, 8, 1), norm(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4),
    )  # fmt: skip


NETS = {
    "transformer block, LayerNorm": TransformerBlock,
    "depthwise-separable, BatchNorm": lambda: separable(nn.BatchNorm2d),
    "depthwise-separable, GroupNorm": lambda: separable(lambda channels: nn.GroupNorm(2, channels)),
    "perceptron, dropout": lambda: net(dropout=0.4),
    "transformer block, dropout": lambda: TransformerBlock(0.2),
}
SCORES = {
    "logit": lambda o, y: o.gather(1, y[:, None])[:, 0],
    "log_probability": lambda o, y: -F.cross_entropy(o, y, reduction="none"),
}


def by_autograd(ensemble, x, y, weight=1.0, scale=None, score="logit", bandwidth="median"):
    """The gradient of sum_i CE_i + w R by its definition, with s_j and h constants in it; J and d."""
    x = x.detach().requires_grad_()
    losses, rows = [], []
    for member in ensemble.members:
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            outputs = member(x)
        losses.append(F.cross_entropy(outputs, y))
        rows.append(torch.autograd.grad(SCORES[score](outputs, y).sum(), x, create_graph=True)[0].flatten(1))
    rows = torch.stack(rows)
    s = reference.normalise(rows, 1e-24)
    d = reference.squared_distances(s, s.detach(), scale)
    value = reference.value(d, reference.bandwidth_of(d.detach(), bandwidth))
    total = torch.stack(losses).sum() + weight * value
    parameters = [p for p in ensemble.parameters() if p.requires_grad]
    g = torch.cat([part.flatten() for part in torch.autograd.grad(total, parameters)])
    return g.view_as(ensemble.flat), rows.detach(), d.detach()


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("make", NETS.values(), ids=NETS)
def test_pull_back_is_exact(make, score):
    ensemble = ff.Ensemble(make, 3).double()
    x, y = batch(6, F64)
    for scale, weight in ((None, 1.0), (make_pca(12), 7.0), (make_pca(12, 4, 0.3), 0.5)):
        objective = Objective(ff.Method(ff.InputGradients(score)), scale, weight)
        torch.manual_seed(4)  # the same dropout masks
        exact, _, d = by_autograd(ensemble, x, y, weight, scale, score=score)
        torch.manual_seed(4)
        g, log = gradient(ensemble, ensemble.flat, init(ensemble).buffers, x, y, objective)
        assert relative(g, exact) < 1e-9
        torch.manual_seed(4)
        plain, _ = gradient(ensemble, ensemble.flat, None, x, y, Objective(ff.Method(None)))
        assert relative(g - plain, exact - plain) < 1e-9  # not hidden under the cross-entropy's
        assert log.repulsion == pytest.approx(float(reference.value(d, reference.bandwidth_of(d))), rel=1e-10)
        assert log.dead_rows == 0


def test_batchnorm_is_in_training_mode_and_updated_once():
    ensemble = ff.Ensemble(net, 3).eval()
    once = copy.deepcopy(ensemble).train()
    trainer, (x, y) = ff.Trainer(ensemble, accelerate=False), batch()
    trainer.step(x, y)
    once(x)
    for member, other in zip(ensemble.members, once.members, strict=True):
        for (name, b), wanted in zip(member.named_buffers(), other.buffers(), strict=True):
            assert torch.equal(b, wanted), name
    assert int(ensemble.member(0)[2].num_batches_tracked) == 1


def test_batchnorm_without_running_statistics():
    """In evaluation mode it still needs more than one sample."""

    def model():
        norm = nn.BatchNorm1d(6, track_running_stats=False)
        return nn.Sequential(nn.Flatten(), nn.Linear(12, 6), norm, nn.Linear(6, 4))

    assert torch.isfinite(ff.Trainer(ff.Ensemble(model, 2)).step(*batch()).cross_entropy)


def test_modules_that_come_in_evaluation_mode_are_trained_in_training_mode():
    """As pretrained ones do. What is frozen inside a module that trains stays so."""
    ensemble = ff.Ensemble.from_modules([net().eval(), net().eval()])
    trainer = ff.Trainer(ensemble)
    trainer.step(*batch())
    assert all(m.training for m in ensemble.modules())
    ensemble.member(1)[2].eval()
    trainer.step(*batch())
    assert [int(member[2].num_batches_tracked) for member in ensemble.members] == [2, 1]


def test_frozen_and_tied_parameters():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.frozen = nn.Linear(12, 8).requires_grad_(False)
            self.one, self.other, self.head = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 4)
            self.other.weight = self.one.weight

        def forward(self, x):
            x = self.one(self.frozen(x.flatten(1)).tanh()).tanh()
            return self.head(self.other(x).tanh())

    ensemble = ff.Ensemble(Tied, 3).double()
    x, y = batch(6, F64)
    g, _ = gradient(ensemble, ensemble.flat, None, x, y, Objective(ff.Method(ff.InputGradients())))
    assert relative(g, by_autograd(ensemble, x, y)[0]) < 1e-9
    frozen = [member.frozen.weight.clone() for member in ensemble.members]
    ff.Trainer(ensemble).step(x, y)
    assert all(torch.equal(m.frozen.weight, old) for m, old in zip(ensemble.members, frozen, strict=True))
    assert all(m.one.weight is m.other.weight for m in ensemble.members)


def mean_cosine(rows):
    """Over pairs of members and over samples, of J [M, B, D]."""
    pairs = list(itertools.combinations(rows, 2))
    return sum(float(F.cosine_similarity(a, b, dim=1).mean()) for a, b in pairs) / len(pairs)


# ---------------------------------------------------------------- what is dead


def zero_head(module):
    with torch.no_grad():
        module[-1].weight.zero_()
    return module


def test_zero_heads_at_the_first_step():
    """As the published ResNets start: J = 0 everywhere."""
    ensemble = ff.Ensemble(lambda: zero_head(net()), 3)
    x, y = batch()
    plain, _ = gradient(ensemble, ensemble.flat, init(ensemble).buffers, x, y, Objective(ff.Method(None)))
    objective = Objective(ff.Method(ff.InputGradients()), repulsion_weight=50.0)
    g, log = gradient(ensemble, ensemble.flat, init(ensemble).buffers, x, y, objective, measure_ratio=True)
    assert torch.equal(g, plain)
    assert all(torch.isfinite(value) for value in log)
    assert log.gradient_ratio == 0
    assert log.dead_rows == 3 * len(x)
    trainer = ff.Trainer(ensemble)
    for _ in range(3):
        assert all(torch.isfinite(value) for value in trainer.step(x, y))
    assert torch.isfinite(ensemble.flat).all()


@pytest.mark.parametrize("backend", ["reference", "cpp"])
def test_dead_rows_have_no_gradient_and_are_counted(backend):
    """Member 0 has J = 0 but dJ/dtheta is not: its cotangent of order 1 / sqrt(eps) = 1e12 would be felt."""
    ensemble = ff.Ensemble.from_modules([zero_head(net()), net(), net()]).double()
    x, y = batch(6, F64)
    exact, rows, _ = by_autograd(ensemble, x, y)
    plain, _ = gradient(ensemble, ensemble.flat, None, x, y, Objective(ff.Method(None)))
    g, log = gradient(ensemble, ensemble.flat, None, x, y, Objective(ff.Method(ff.InputGradients()), backend=backend))
    assert (rows[0] == 0).all()
    assert log.dead_rows == 6
    assert torch.equal(g[0], plain[0])
    assert exact[0].norm() > 1e6
    assert relative(g[1:], exact[1:]) < 1e-9


def test_one_dead_sample_of_one_member():
    """No ReLU of member 1 is alive on sample 2, whose J and dJ/dtheta are therefore 0."""

    def perceptron():
        return nn.Sequential(nn.Flatten(), nn.Linear(12, 5), nn.ReLU(), nn.Linear(5, 4))

    ensemble = ff.Ensemble(perceptron, 3).double()
    x, y = batch(6, F64)
    x[2] = torch.ones(3, 2, 2)
    with torch.no_grad():
        ensemble.member(1)[1].weight.sub_(1)
        x[:2].mul_(-1).sub_(1)  # alive
    exact, rows, _ = by_autograd(ensemble, x, y)
    dead = rows.square().sum(2) == 0
    assert dead[1, 2]
    g, log = gradient(ensemble, ensemble.flat, None, x, y, Objective(ff.Method(ff.InputGradients())))
    assert log.dead_rows == dead.sum() < 6
    assert float(log.gradient_cosine) == pytest.approx(mean_cosine(rows))  # 0 where one is dead
    assert torch.isfinite(g).all()
    assert relative(g, exact) < 1e-9


# ---------------------------------------------------------------- what is logged


METHODS = {
    "default": "median",
    "first": ff.Median(owner="first"),
    "squared, first": ff.Median(owner="first", squared=True),
    "sample": ff.Median(over="sample"),
    "batch": ff.Median(over="batch", add_one=True),
    "number": 0.7,
}


@pytest.mark.parametrize("bandwidth", METHODS.values(), ids=METHODS)
def test_log_follows_its_formulas(bandwidth):
    ensemble = ff.Ensemble(net, 4).double()
    x, y = batch(6, F64)
    exact, rows, d = by_autograd(ensemble, x, y, weight=3.0, bandwidth=bandwidth)
    method = ff.Method(ff.InputGradients(), bandwidth=bandwidth)

    def measured(weight):
        objective = Objective(method, ff.PCA(torch.eye(12), torch.ones(12), variance=5.0), weight)
        return gradient(ensemble, ensemble.flat, None, x, y, objective, measure_ratio=True)

    plain, _ = gradient(ensemble, ensemble.flat, None, x, y, Objective(ff.Method(None)))
    g, log = measured(3.0)
    assert relative(g, exact) < 1e-9
    h = reference.bandwidth_of(d, bandwidth)
    p = reference.weights(d, h)
    entropy = sum(-float((p[i] * p[i].log()).sum()) for i in range(4)) / 4
    assert float(log.repulsion) == pytest.approx(float(reference.value(d, h)), rel=1e-10)
    assert float(log.weight_entropy) == pytest.approx(entropy, rel=1e-9)
    assert float(log.gradient_cosine) == pytest.approx(mean_cosine(rows), rel=1e-9)
    assert float(log.bandwidth_median) == pytest.approx(float(torch.quantile(d, 0.5, dim=0).mean()), rel=1e-9)
    assert float(log.gradient_ratio) == pytest.approx(float((exact - plain).norm() / plain.norm()), rel=1e-8)
    k = torch.exp(-d / h)
    assert float(log.kernel_mean) == pytest.approx(float(k[~torch.eye(4, dtype=bool)].mean()), rel=1e-9)
    cosines = F.cosine_similarity(rows, x.flatten(1).expand(4, -1, -1), dim=2)
    assert float(log.input_alignment) == pytest.approx(float(cosines.abs().mean()), rel=1e-9)
    assert float(log.input_variance) == pytest.approx(float(x.flatten(1).var(0).sum()) / 5, rel=1e-9)
    assert float(measured(1.5)[1].gradient_ratio) == pytest.approx(float(log.gradient_ratio) / 2, rel=1e-8)


def test_ratio_is_kept_between_its_measurements():
    trainer, data = ff.Trainer(ff.Ensemble(net, 3)), batches(12)
    ratios = [float(trainer.step(x, y).gradient_ratio) for x, y in data]
    assert ratios[0] > 0
    assert len(set(ratios[:10])) == 1
    assert ratios[10] == ratios[11] != ratios[0]


# ---------------------------------------------------------------- optimisers and the schedule


def test_adam_is_adam_on_each_module():
    ensemble = ff.Ensemble(net, 3)
    twin = copy.deepcopy(ensemble)
    data = batches(12)
    trainer = ff.Trainer(ensemble, optimizer=lambda p: torch.optim.Adam(p, lr=1e-2), accelerate=False)
    adams = [torch.optim.Adam(member.parameters(), lr=1e-2) for member in twin.members]
    for step, (x, y) in enumerate(data):
        g, _ = gradient(twin, twin.flat, None, x, y, trainer.objective)
        trainer.step(x, y, rate=0.5 if step > 5 else 1.0)
        for member, row, adam in zip(twin.members, g, adams, strict=True):
            parameters = list(member.parameters())
            for p, own in zip(parameters, row.split([p.numel() for p in parameters]), strict=True):
                p.grad = own.view_as(p)
            adam.param_groups[0]["lr"] = 5e-3 if step > 5 else 1e-2
            adam.step()
    assert same_state(ensemble, state_of(twin))
    assert all(p.grad is None for p in ensemble.parameters())


def test_sgd_as_optimizer_is_the_own_sgd():
    own, other = ff.Ensemble(net, 3), ff.Ensemble(net, 3)
    sgd = {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 5e-4}
    data = batches(5)
    ff.Trainer(own, **sgd).fit(data, 4)
    ff.Trainer(other, optimizer=lambda parameters: torch.optim.SGD(parameters, **sgd)).fit(data, 4)
    assert same_state(own, state_of(other))


def test_published_schedule_of_300_epochs():
    rates = [published_schedule(epoch / 300) for epoch in range(301)]
    assert rates[:151] == [1.0] * 151
    assert rates[210] == pytest.approx(0.505)  # half of the way from 150 to 270
    assert rates[269] == pytest.approx(0.01 + 0.99 / 120)
    assert rates[270:] == pytest.approx([0.01] * 31)
    assert all(a >= b for a, b in itertools.pairwise(rates))
    assert published_schedule(0.9, ratio=0.001) == pytest.approx(0.001)
    assert published_schedule(0.7, ratio=0.001) == pytest.approx(0.5005)


SCHEDULES = {"published": published_schedule, "own": lambda progress: 1 - progress / 2}


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
def test_fit_is_a_plain_loop_at_the_schedules_rates(schedule):
    ensemble = ff.Ensemble(net, 2)
    models = [copy.deepcopy(member) for member in ensemble.members]
    data, seen = batches(3), []
    trainer = ff.Trainer(ensemble, "de")
    trainer.fit(data, 10, schedule, on_step=lambda epoch, log: seen.append((epoch, float(log.cross_entropy))))
    rates = [schedule(epoch / 10) for epoch in range(10) for _ in data]
    assert_same_networks(ensemble, plain_loop(models, data * 10, rates))
    assert [epoch for epoch, _ in seen] == [epoch for epoch in range(10) for _ in data]
    assert trainer.steps == 30


def test_fit_is_reproducible_and_leaves_the_global_random_state():
    shuffled = torch.utils.data.TensorDataset(*batch(24))
    data = torch.utils.data.DataLoader(shuffled, 6, shuffle=True)

    def run(seed, disturbance):
        torch.manual_seed(disturbance)
        state = torch.get_rng_state()
        ensemble = ff.Ensemble(lambda: net(dropout=0.5), 3, seed=1)
        ff.Trainer(ensemble, seed=seed).fit(data, 3)
        assert torch.equal(torch.get_rng_state(), state)
        return ensemble.flat

    assert torch.equal(run(0, 1), run(0, 2))
    assert not torch.equal(run(0, 1), run(1, 1))


def test_masks_differ_between_epochs():
    data, masks = batches(1), []

    class Noted(nn.Dropout):
        def forward(self, x):
            masks.append(super().forward(torch.ones_like(x)))
            return x

    ensemble = ff.Ensemble(lambda: nn.Sequential(nn.Flatten(), Noted(), nn.Linear(12, 4)), 1)
    ff.Trainer(ensemble, "de").fit(data, 2)
    assert not torch.equal(masks[-1], masks[-2])


def test_a_cast_ensemble_is_trained_on_in_its_dtype():
    x, y = batch(6)
    ensemble = ff.Ensemble(net, 2)
    trainer = ff.Trainer(ensemble)
    trainer.step(x, y)
    ensemble.double()
    trainer.step(x.double(), y)
    assert trainer.velocity.dtype == ensemble.flat.dtype == F64


def test_a_method_of_another_space_has_its_own_dimension():
    """Outputs as particles, D = K: function space. A bandwidth over the batch has no sample of its own."""

    def outputs_of(forward, x, y):
        outputs = forward(x)
        return outputs, outputs

    method = ff.Method(outputs_of, normalize=False)
    trainer = ff.Trainer(ff.Ensemble(net, 3), method, lengthscale=make_pca(4))
    x, y = batch()
    assert torch.isfinite(trainer.step(x, y).repulsion)


@pytest.mark.parametrize("loss", [lambda o, y: F.cross_entropy(o, y, label_smoothing=0.1), F.cross_entropy])
def test_soft_labels_and_other_losses(loss):
    x, y = batch()
    soft = F.one_hot(y, 4).float() * 0.9 + 0.025
    method = ff.Method(ff.InputGradients(lambda outputs, y: (outputs * y).sum(1)))
    ensemble = ff.Ensemble(net, 3)
    trainer = ff.Trainer(ensemble, method, loss=loss)
    wanted = sum(loss(copy.deepcopy(member)(x), soft) for member in ensemble.members)
    log = trainer.step(x, soft)
    assert torch.allclose(log.cross_entropy, wanted)
    assert log.repulsion > 0


# ---------------------------------------------------------------- what it does


def test_repulsion_makes_input_gradients_differ_on_real_images():
    """Over ten seeds the difference was 0.31, its standard deviation 0.02."""
    digits = ff.data.load("digits")
    normalise = ff.data.Normalisation.fit(digits.train_images)
    images, labels = normalise(digits.train_images[:640]), digits.train_labels[:640]

    def cosine(method, seed):
        ensemble = ff.Ensemble(lambda: ff.models.mlp(10, (1, 8, 8), hidden=(32,)), 3, seed=seed)
        loader = ff.data.Loader(images, labels, 64, seed=seed)
        ff.Trainer(ensemble, method, repulsion_weight=20.0).fit(loader, 6)
        probe = Objective(ff.Method(ff.InputGradients()))
        log = gradient(ensemble, ensemble.flat, None, images[:256], labels[:256], probe)[1]
        accuracy = ff.score(ensemble.predict_proba(images), labels)["accuracy"]
        return float(log.gradient_cosine), accuracy

    for seed in range(2):
        (plain, plain_accuracy), (repelled, accuracy) = cosine("de", seed), cosine("forde", seed)
        assert repelled < plain - 0.2, (plain, repelled)
        assert min(plain_accuracy, accuracy) > 0.9


# ---------------------------------------------------------------- what comes in


@pytest.mark.parametrize("shape", [(6, 3, 2, 3), (6, 13)], ids=str)
def test_a_shape_the_network_cannot_take_changes_nothing(shape):
    """The BatchNorm before the layer that fails would have been updated."""
    ensemble = ff.Ensemble(lambda: nn.Sequential(nn.BatchNorm2d(3), net()), 2)
    trainer = ff.Trainer(ensemble)
    trainer.step(X, Y)
    kept = state_of(ensemble)
    with pytest.raises((RuntimeError, ValueError)):
        trainer.step(torch.randn(shape), Y)
    assert same_state(ensemble, kept)


X, Y = torch.randn(6, 3, 2, 2), torch.tensor([0, 1, 2, 3, 0, 1])


def with_value(value):
    x = X.clone()
    x[1, 2, 0, 1] = value
    return x


BAD_BATCHES = [
    (X.double(), Y, TypeError, r"^x: expected dtype torch.float32, as the members, got torch.float64"),
    (X.long(), Y, TypeError, r"^x: expected float32, float64 or bfloat16, got torch.int64"),
    (X.to(torch.uint8), Y, TypeError, r"^x: expected float32, float64 or bfloat16, got torch.uint8"),
    (X.tolist(), Y, TypeError, r"^x: expected a torch.Tensor, got list"),
    (X.numpy(), Y, TypeError, r"^x: expected a torch.Tensor, got ndarray"),
    (X[0, 0, 0], Y, ValueError, r"^x: expected 2 dimensions \[B, ...\], got shape \[2\]"),
    (X[:0], Y[:0], ValueError, r"^x: expected at least one of each of B"),
    (with_value(float("nan")), Y, ValueError, r"^x: expected finite numbers, got nan at \[1, 2, 0, 1\]"),
    (with_value(-float("inf")), Y, ValueError, r"^x: expected finite numbers, got -inf at \[1, 2, 0, 1\]"),
    (torch.randn(6, 3, 2, 3), Y, ValueError, r"^x: expected 12 values per sample, as the lengthscale"),
    (X, Y.tolist(), TypeError, r"^y: expected a torch.Tensor, got list"),
    (X, Y[:5], ValueError, r"^y: expected 6 of them, one per sample, got \[5\]"),
    (X, torch.tensor(1), ValueError, r"^y: expected 6 of them, one per sample, got \[\]"),
    (X, Y[:, None], ValueError, r"^y: expected 1 dimension \[B\], got shape \[6, 1\]"),
    (X, Y + 1, ValueError, r"^y: expected values from 0 to 3, got values from 1 to 4"),
    (X, Y - 1, ValueError, r"^y: expected values from 0 to 3, got values from -1 to 2"),
    (X, Y.float(), TypeError, r"^y: expected an integer tensor, got torch.float32"),
    (X, Y > 0, TypeError, r"^y: expected an integer tensor, got torch.bool"),
    (X, Y.int(), TypeError, r"^y: expected dtype torch.int64, got torch.int32"),
    (X, Y.to(torch.uint8), TypeError, r"^y: expected dtype torch.int64, got torch.uint8"),
    (X, torch.rand(6, 4), TypeError, r"^y: expected an integer tensor, got torch.float32"),
]


@pytest.mark.parametrize("after", [0, 1], ids=["first step", "second step"])
@pytest.mark.parametrize(("x", "y", "error", "message"), BAD_BATCHES, ids=[m[1:40] for *_, m in BAD_BATCHES])
def test_bad_batches_are_named_before_anything_changes(x, y, error, message, after):
    ensemble = ff.Ensemble(net, 2)
    trainer = ff.Trainer(ensemble, lengthscale=make_pca(12))
    for _ in range(after):
        trainer.step(X, Y)
    kept, velocity, random = state_of(ensemble), trainer.velocity.clone(), torch.get_rng_state()
    with pytest.raises(error, match=message) as raised:
        trainer.step(x, y)
    assert "\n" not in str(raised.value)
    assert same_state(ensemble, kept)
    assert torch.equal(trainer.velocity, velocity)
    assert torch.equal(torch.get_rng_state(), random)
    assert trainer.steps == after


@pytest.mark.parametrize("y", [Y + 1, Y - 1, Y.int(), Y.float()], ids=["above", "below", "int32", "float"])
def test_labels_are_looked_at_for_other_losses_too(y):
    ensemble = ff.Ensemble(net, 2)
    kept = state_of(ensemble)
    with pytest.raises((TypeError, ValueError), match=r"^y: expected"):
        ff.Trainer(ensemble, loss=lambda o, y: F.cross_entropy(o, y, label_smoothing=0.1)).step(X, y)
    assert same_state(ensemble, kept)


BAD_ARGUMENTS = [
    ({"method": "fordes"}, ValueError, r"^method: expected one of de, forde, weight-rde, .*, got 'fordes'"),
    ({"method": None}, ValueError, r"^method: expected one of de, forde, weight-rde, .*, got None"),
    ({"method": ["de"]}, ValueError, r"^method: expected one of de, forde, weight-rde, .*, got \['de'\]"),
    ({"backend": "cude"}, ValueError, r"^backend: expected one of auto, reference, cpp, triton"),
    ({"lr": 0}, ValueError, r"^lr: expected a finite number > 0, got 0"),
    ({"lr": -0.1}, ValueError, r"^lr: expected a finite number > 0, got -0.1"),
    ({"lr": float("nan")}, ValueError, r"^lr: expected a finite number > 0, got nan"),
    ({"lr": "0.1"}, ValueError, r"^lr: expected a finite number > 0, got '0.1'"),
    ({"eps": 0.0}, ValueError, r"^eps: expected a finite number > 0, got 0.0"),
    ({"eps": -1e-24}, ValueError, r"^eps: expected a finite number > 0, got -1e-24"),
    ({"repulsion_weight": -1}, ValueError, r"^repulsion_weight: expected a finite number >= 0, got -1"),
    ({"repulsion_weight": float("inf")}, ValueError, r"^repulsion_weight: expected a finite number >= 0"),
    ({"weight_decay": -1e-4}, ValueError, r"^weight_decay: expected a finite number >= 0, got -0.0001"),
    ({"momentum": -0.9}, ValueError, r"^momentum: expected a finite number >= 0, got -0.9"),
    ({"lengthscale": "pca"}, TypeError, r"^lengthscale: expected None or a lengthscale .*, got str"),
    ({"lengthscale": torch.eye(12)}, TypeError, r"^lengthscale: expected None or .*, got Tensor"),
    ({"optimizer": 5}, TypeError, r"^optimizer: expected a callable that takes parameters, got int"),
    ({"loss": "cross_entropy"}, TypeError, r"^loss: expected a callable"),
    ({"seed": -1}, ValueError, r"^seed: expected a whole number >= 0, got -1"),
]


@pytest.mark.parametrize(("given", "error", "message"), BAD_ARGUMENTS, ids=[m for *_, m in BAD_ARGUMENTS])
def test_bad_arguments_are_named(given, error, message):
    with pytest.raises(error, match=message):
        ff.Trainer(ff.Ensemble(net, 2), **given)


def test_the_ensemble_must_be_one():
    with pytest.raises(TypeError, match=r"^ensemble: expected an Ensemble, got Sequential"):
        ff.Trainer(net())


def test_numpy_numbers_are_numbers():
    ff.Trainer(ff.Ensemble(net, 2), lr=np.float32(0.1), eps=np.float64(1e-24), repulsion_weight=np.int64(2))


@pytest.mark.parametrize("epochs", [0, -1, 1.5, True, "3"])
def test_epochs_must_be_a_whole_number(epochs):
    with pytest.raises(ValueError, match=r"^epochs: expected a whole number >= 1, got "):
        ff.Trainer(ff.Ensemble(net, 2)).fit([(X, Y)], epochs)


def test_empty_loader():
    trainer = ff.Trainer(ff.Ensemble(net, 2))
    with pytest.raises(ValueError, match=r"^loader: expected at least one batch .*, got none in epoch 0"):
        trainer.fit([], 3)
    with pytest.raises(ValueError, match=r"^loader: .* none in epoch 1"):
        trainer.fit(iter([(X, Y)]), 2)  # can be read only once
