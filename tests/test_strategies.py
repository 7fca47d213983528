"""How members are computed changes nothing but rounding: gradients, buffers, the published run, memory, choices."""

import copy

import pytest
import torch
from torch import nn
from trainer_cases import assert_members_have, batch, by_autograd, golden, net, published_trainer, relative

import forde_fast as ff
from forde_fast import choice, strategies
from forde_fast.step import SGD, Objective, gradient, init, update
from forde_fast.strategies import LOOP, Strategy

F64 = torch.float64
STACKED, TWO = Strategy("stacked"), Strategy("stacked", members_at_a_time=2)
STRATEGIES = {
    "stacked": STACKED,
    "stacked by two": TWO,
    "one at a time": Strategy(members_at_a_time=1),
    "three at a time": Strategy(members_at_a_time=3),
}


def convolutional(dropout=0.0):
    return nn.Sequential(
        nn.Conv2d(3, 5, 2, padding=1), nn.BatchNorm2d(5), nn.ReLU(), nn.Dropout(dropout), nn.MaxPool2d(2),
        nn.Conv2d(5, 6, 1), nn.GroupNorm(2, 6), nn.SiLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 4),
    )  # fmt: skip


def results(ensemble, strategy, x, y, objective, seed=3):
    buffers = init(ensemble).buffers
    torch.manual_seed(seed)
    g, log = gradient(ensemble, ensemble.flat, buffers, x, y, objective, True, strategy)
    return g, torch.stack(log), [b for own in buffers for b in own.values()], torch.rand(1)


def assert_same(found, wanted):
    for one, other in zip((*found[:2], *found[2]), (*wanted[:2], *wanted[2]), strict=True):
        assert torch.allclose(one.double(), other.double(), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("weight", [0.0, 3.0])
@pytest.mark.parametrize("strategy", STRATEGIES.values(), ids=STRATEGIES)
@pytest.mark.parametrize("make", [net, convolutional])
def test_all_strategies_compute_the_same(make, strategy, weight):
    ensemble = ff.Ensemble(make, 5).double()
    x, y = batch(7, F64)
    objective = Objective(ff.Method(ff.InputGradients("log_probability")), repulsion_weight=weight)
    wanted = results(ensemble, LOOP, x, y, objective)
    assert_same(results(ensemble, strategy, x, y, objective), wanted)
    if weight:
        exact = by_autograd(ensemble, x, y, weight, score="log_probability")[0]
        assert relative(wanted[0], exact) < 1e-9


@pytest.mark.parametrize("strategy", [Strategy(members_at_a_time=1), Strategy(members_at_a_time=2)], ids=str)
def test_what_is_computed_twice_has_the_same_masks_and_leaves_the_same_generator(strategy):
    ensemble = ff.Ensemble(lambda: convolutional(0.4), 4).double()
    x, y = batch(6, F64)
    objective = Objective(ff.Method(ff.InputGradients()), repulsion_weight=3.0)
    wanted, found = (results(ensemble, one, x, y, objective) for one in (LOOP, strategy))
    assert_same(found, wanted)
    assert torch.equal(found[3], wanted[3])


def test_stacked_members_have_masks_of_their_own():
    one = net(dropout=0.5)
    ensemble = ff.Ensemble.from_modules([copy.deepcopy(one) for _ in range(3)])
    g, _ = gradient(ensemble, ensemble.flat, None, *batch(), Objective(ff.Method(None)), strategy=STACKED)
    assert not torch.equal(g[0], g[1])


@pytest.mark.parametrize("strategy", ["stacked", "auto"])
@pytest.mark.parametrize("at_a_time", [None, 2])
def test_published_run(strategy, at_a_time):
    trainer = published_trainer("reference")
    objective, ensemble = trainer.objective, trainer.ensemble
    options = {"lr": trainer.sgd.lr, "momentum": trainer.sgd.momentum, "weight_decay": trainer.sgd.weight_decay}
    trainer = ff.Trainer(ensemble, lengthscale=objective.lengthscale, eps=objective.eps, strategy=strategy,
                         members_at_a_time=at_a_time, **options)  # fmt: skip
    for x, y in zip(golden("images"), golden("labels"), strict=True):
        trainer.step(x, y)
    assert strategy == "auto" or trainer.strategy == trainer.strategy_report == "stacked"
    assert_members_have(ensemble, ensemble.flat, "end", 1e-8)


class Alive:
    """The most bytes that autograd's graphs kept at a time."""

    def __enter__(self):
        self.bytes = self.most = 0

        class Kept:
            def __init__(kept, tensor):
                kept.tensor = tensor.detach()  # an output with its graph would hold itself
                self.bytes += tensor.nbytes
                self.most = max(self.most, self.bytes)

            def __del__(kept):
                self.bytes -= kept.tensor.nbytes

        self.hooks = torch.autograd.graph.saved_tensors_hooks(Kept, lambda kept: kept.tensor)
        self.hooks.__enter__()
        return self

    def __exit__(self, *error):
        self.hooks.__exit__(*error)


def test_fewer_members_at_a_time_need_less_memory():
    ensemble = ff.Ensemble(lambda: net(width=64), 8)
    most = []
    for at_a_time in (8, 4, 1):
        with Alive() as alive:
            objective = Objective(ff.Method(ff.InputGradients()))
            gradient(ensemble, ensemble.flat, None, *batch(64), objective, strategy=Strategy("loop", at_a_time))
        most.append(alive.most)
    assert most[1] < 0.6 * most[0]
    assert most[2] < 0.2 * most[0]


# ---------------------------------------------------------------- cheaper repulsion


def test_lazy_repulsion_acts_at_every_kth_step_with_k_times_its_weight():
    ensemble = ff.Ensemble(net, 3).double()
    trainer = ff.Trainer(copy.deepcopy(ensemble), repulsion_weight=2.0, repulsion_every=3)
    state, seen = init(ensemble), []
    for step in range(7):
        x, y = batch(6, F64)
        method = ff.Method(ff.InputGradients() if step % 3 == 0 else None)
        state, wanted = update(state, x, y, ensemble, Objective(method, repulsion_weight=6.0), SGD())
        seen.append(trainer.step(x, y))
        assert relative(trainer.ensemble.flat, state.parameters) < 1e-12
        assert torch.allclose(seen[-1].cross_entropy, wanted.cross_entropy)
    assert seen[0].repulsion == seen[1].repulsion == seen[2].repulsion != seen[3].repulsion == seen[4].repulsion


def test_repulsion_on_all_samples_is_the_exact_one_and_on_some_is_that_of_the_smaller_batch():
    ensemble, (x, y) = ff.Ensemble(convolutional, 3).double(), batch(8, F64)
    method = ff.Method(ff.InputGradients())
    exact = results(ensemble, LOOP, x, y, Objective(method))
    assert torch.equal(results(ensemble, LOOP, x, y, Objective(method, repulsion_samples=8))[0], exact[0])
    plain = results(ensemble, LOOP, x, y, Objective(ff.Method(None)))
    small = [results(ensemble, LOOP, x[:5], y[:5], Objective(ff.Method(s)))[0] for s in (method.space, None)]
    for strategy in (LOOP, STACKED, TWO, Strategy(members_at_a_time=1)):
        found = results(ensemble, strategy, x, y, Objective(method, repulsion_samples=5))
        assert relative(found[0], plain[0] + 5 / 8 * (small[0] - small[1])) < 1e-9
        for one, other in zip(found[2], plain[2], strict=True):  # running statistics are the whole batch's
            assert torch.allclose(one, other, rtol=1e-12)


# ---------------------------------------------------------------- precision


@pytest.mark.parametrize("kind", ["loop", "stacked"])
def test_bf16_is_near_and_keeps_what_is_float32(kind):
    ensemble = ff.Ensemble(lambda: net(width=32), 3)
    x, y = batch(32)
    objective = Objective(ff.Method(ff.InputGradients()))
    exact, _ = gradient(ensemble, ensemble.flat, init(ensemble).buffers, x, y, objective)
    g, log = gradient(ensemble, ensemble.flat, None, x, y, objective, strategy=Strategy(kind, precision="bf16"))
    assert g.dtype == log.repulsion.dtype == torch.float32
    assert 1e-5 < relative(g, exact) < 0.1


# ---------------------------------------------------------------- which is chosen


class Asks(nn.Module):
    """Control flow that hangs on numbers, which torch.vmap cannot follow."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(12, 4)

    def forward(self, x):
        y = self.layer(x.flatten(1))
        return y if y.sum() > 0 else y * 2


def outputs_of(forward, x, y):
    outputs = forward(x)
    return outputs, outputs


def differing():
    members = [net(), net()]
    members[1][3] = nn.GELU()
    return ff.Ensemble.from_modules(members)


class Power(nn.Module):
    def __init__(self, exponent):
        super().__init__()
        self.exponent, self.layer = exponent, nn.Linear(12, 4)

    def forward(self, x):
        return self.layer(x.flatten(1)) ** self.exponent


CANNOT = {
    "control flow": (lambda: ff.Ensemble(Asks, 2), {}, "not stacked: RuntimeError"),
    "space": (lambda: ff.Ensemble(net, 2), {"method": ff.Method(outputs_of)}, "space outputs_of has no stacked form"),
    "layers": (differing, {}, "not built alike"),
    "numbers": (lambda: ff.Ensemble.from_modules([Power(1), Power(2)]), {}, "losses come out otherwise"),
}


@pytest.mark.parametrize(("make", "options", "reason"), CANNOT.values(), ids=CANNOT)
def test_what_cannot_be_stacked_is_a_loop_and_says_why(make, options, reason):
    ensemble = make()
    twin = copy.deepcopy(ensemble)
    trainer, plain = ff.Trainer(ensemble, strategy="stacked", **options), ff.Trainer(twin, **options)
    x, y = batch()
    for own in (trainer, plain):
        own.step(x, y)
    assert trainer.strategy == "loop"
    assert reason in trainer.strategy_report
    assert torch.equal(ensemble.flat, twin.flat)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_auto_leaves_everything_as_it_was_and_takes_the_fastest(monkeypatch, dropout):
    ensemble = ff.Ensemble(lambda: net(dropout), 3)
    seconds = iter(range(10**6))
    monkeypatch.setattr(choice, "_now", lambda device: next(seconds))  # all take as long
    before, random = copy.deepcopy(ensemble.state_dict()), torch.get_rng_state()
    objective = Objective(ff.Method(ff.InputGradients()))
    found = choice.choose("auto", LOOP, ensemble, objective, *batch(), accelerate=False)
    assert found.strategy == LOOP
    assert ("random numbers" in found.report) == (dropout > 0)
    assert all(torch.equal(b, before[name]) for name, b in ensemble.state_dict().items())
    torch.set_rng_state(random)
    batch()
    wanted = torch.rand(3)
    torch.set_rng_state(random)
    x, y = batch()
    choice.choose("auto", LOOP, ensemble, objective, x, y, accelerate=False)
    assert torch.equal(torch.rand(3), wanted)


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("can't allocate memory")]
)
def test_what_is_out_of_memory_is_not_measured(monkeypatch, error):
    def failing(*given, strategy):
        if strategy.kind == "stacked":
            raise error
        return gradient(*given, strategy=strategy)

    monkeypatch.setattr(choice, "gradient", failing)
    given = ff.Ensemble(net, 2), Objective(ff.Method(None)), *batch()
    candidates = {"loop": choice.Choice(LOOP, None), "stacked": choice.Choice(STACKED, None)}
    assert list(choice._measure(candidates, *given)) == ["loop"]
    error = ValueError("of a module")
    with pytest.raises(ValueError, match="of a module"):
        choice._measure({"stacked": choice.Choice(STACKED, None)}, *given)


def test_auto_without_repulsion_is_the_deep_ensemble_and_stacks_small_members(monkeypatch):
    monkeypatch.setattr(choice, "_measured", {})
    monkeypatch.setattr(choice, "_measure", lambda candidates, *_: {n: 1.0 + (n == "loop") for n in candidates})
    (x, y), ensemble = batch(), ff.Ensemble(net, 3)
    weightless = {"repulsion_weight": 0.0, "lengthscale": ff.Identity(), "eps": 1e-6}
    trainers = [ff.Trainer(copy.deepcopy(ensemble), **own, strategy="auto") for own in ({"method": "de"}, weightless)]
    for trainer in trainers:
        trainer.step(x, y)
    assert [trainer.strategy for trainer in trainers] == ["stacked", "stacked"]
    assert len(choice._measured) == 1
    assert torch.equal(trainers[0].ensemble.flat, trainers[1].ensemble.flat)
    deep = Objective(ff.Method(None))
    assert choice.choose("auto", LOOP, ff.Ensemble(net, 1), deep, x, y, accelerate=False).strategy == LOOP
    monkeypatch.setattr(strategies, "SMALL", 10)
    assert choice.choose("auto", LOOP, ensemble, deep, x, y, accelerate=False).strategy == LOOP


@pytest.mark.parametrize("accelerate", [True, False])
def test_auto_without_repulsion_stacks_with_fast_layers_if_it_may(monkeypatch, accelerate):
    monkeypatch.setattr(choice, "_measured", {})
    monkeypatch.setattr(choice, "_measure", lambda candidates, *_: {n: 1.0 + (n == "loop") for n in candidates})
    ensemble, (x, y) = ff.Ensemble(lambda: ff.models.cnn(4, 3, 4), 3).double(), batch(6, F64)
    options = {"method": "de", "strategy": "auto", "accelerate": accelerate}
    plain, trainer, resumed = (
        ff.Trainer(copy.deepcopy(ensemble), **own) for own in ({"method": "de"}, options, options)
    )
    assert type(trainer.ensemble.member(0)[0]) is nn.Conv2d
    for own in (plain, trainer):
        own.step(x, y)
    resumed.load_state_dict(copy.deepcopy(trainer.state_dict()))
    for own in (trainer, resumed):
        assert own.strategy == "stacked"
        assert (type(own.ensemble.member(0)[0]) is nn.Conv2d) != accelerate
    assert relative(trainer.ensemble.flat, plain.ensemble.flat) < 1e-12
    for own in (trainer, resumed):
        own.step(x, y)
    assert torch.equal(trainer.ensemble.flat, resumed.ensemble.flat)


def test_members_in_other_modes_are_not_stacked():
    ensemble, (x, y) = ff.Ensemble(net, 3).double(), batch(6, F64)
    ensemble.member(1)[2].eval()
    objective = Objective(ff.Method(ff.InputGradients()))
    assert_same(results(ensemble, STACKED, x, y, objective), results(ensemble, LOOP, x, y, objective))


def test_grey_images_in_odd_strides_are_plain_ones():
    """Strides (64, 1, 8, 1), as a permuted [N, H, W, 1] has them, pass for channels_last."""
    ensemble = ff.Ensemble(lambda: ff.models.cnn(4, 1, 4), 2).double()
    x, y = torch.randn(6, 1, 8, 8, dtype=F64), torch.randint(4, (6,))
    objective = Objective(ff.Method(ff.InputGradients()))
    wanted = results(ensemble, LOOP, x, y, objective)
    odd = x.as_strided(x.shape, (64, 1, 8, 1))
    assert_same(results(ensemble, LOOP, odd, y, objective), wanted)


BAD = [
    ({"strategy": "stack"}, r"^strategy: expected one of auto, loop, stacked, streams, got 'stack'"),
    ({"precision": "fp16"}, r"^precision: expected one of full, tf32, bf16, got 'fp16'"),
    ({"members_at_a_time": 0}, r"^members_at_a_time: expected a whole number >= 1, got 0"),
    ({"repulsion_every": 0}, r"^repulsion_every: expected a whole number >= 1, got 0"),
    ({"repulsion_every": 2.0}, r"^repulsion_every: expected a whole number >= 1, got 2.0"),
    ({"repulsion_samples": -3}, r"^repulsion_samples: expected a whole number >= 1, got -3"),
]


@pytest.mark.parametrize(("given", "message"), BAD, ids=[m for _, m in BAD])
def test_bad_options_are_named(given, message):
    with pytest.raises(ValueError, match=message):
        ff.Trainer(ff.Ensemble(net, 2), **given)
