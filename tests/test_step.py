"""One step: its gradient is the objective's, dead rows, what the log says."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from trainer_cases import (
    F64,
    SCORES,
    batch,
    batches,
    by_autograd,
    mean_cosine,
    net,
    relative,
)

import forde_fast as ff
from forde_fast import reference
from forde_fast.testing import make_pca
from forde_fast.trainer import SGD, Objective, gradient, init

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize(("make", "message"), [
    (lambda: Objective("forde"), "^method: expected a Method, got str"),
    (lambda: Objective(ff.Method(None), repulsion_weight=-1), "^repulsion_weight: expected a finite number >= 0"),
    (lambda: Objective(ff.Method(None), backend="cub"), "^backend: expected one of auto, reference, "),
    (lambda: Objective(ff.Method(None), repulsion_samples=0), "^repulsion_samples: expected a whole number >= 1"),
    (lambda: SGD(lr=0), "^lr: expected a finite number > 0, got 0"),
    (lambda: SGD(momentum=1), "^momentum: expected a number below 1, got 1"),
])  # fmt: skip
def test_what_is_descended_and_how_are_checked_when_they_are_made(make, message):
    with pytest.raises((TypeError, ValueError), match=message):
        make()


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


def test_a_loss_without_a_gradient_has_no_ratio():
    """Of a margin that all samples keep: training goes on."""
    ensemble, (x, y) = ff.Ensemble(net, 3), batch(6)
    trainer = ff.Trainer(ensemble, loss=lambda outputs, labels: 0 * F.cross_entropy(outputs, labels))
    log = trainer.step(x, y)
    assert log.gradient_ratio == 0
    assert log.repulsion > 0


def test_ratio_is_kept_between_its_measurements():
    trainer, data = ff.Trainer(ff.Ensemble(net, 3)), batches(12)
    ratios = [float(trainer.step(x, y).gradient_ratio) for x, y in data]
    assert ratios[0] > 0
    assert len(set(ratios[:10])) == 1
    assert ratios[10] == ratios[11] != ratios[0]
