"""The trainer: the published run, plain PyTorch where there is no repulsion, optimisers, schedule, what it does."""

import copy
import inspect
import itertools

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from trainer_cases import (
    F32,
    F64,
    assert_members_have,
    assert_same_networks,
    batch,
    batches,
    golden,
    net,
    plain_loop,
    published_trainer,
    same_state,
    state_of,
)

import forde_fast as ff
from forde_fast.step import descend_
from forde_fast.testing import make_pca
from forde_fast.trainer import MEASURED, SGD, Objective, gradient, init, published_schedule, update

pytestmark = pytest.mark.usefixtures("one_thread")


# ---------------------------------------------------------------- the published run


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


def test_torchs_schedulers_move_the_rate():
    """And `fit`'s schedule is a factor on top, which they do not see."""
    x, y = torch.randn(6, 3, 2, 2), torch.randint(4, (6,))
    trainer = ff.Trainer(ff.Ensemble(net, 2), optimizer=lambda p: torch.optim.SGD(p, lr=1.0), weight_decay=0)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(trainer.optimizer, 0.5)
    before = trainer.ensemble.flat.clone()
    trainer.step(x, y, rate=0.0)
    assert torch.equal(trainer.ensemble.flat, before)
    scheduler.step()
    assert [group["lr"] for group in trainer.optimizer.param_groups] == [0.5]
    trainer.step(x, y, rate=0.1)
    half = ff.Trainer(ff.Ensemble(net, 2), optimizer=lambda p: torch.optim.SGD(p, lr=0.05), weight_decay=0)
    half.step(x, y)
    assert torch.allclose(trainer.ensemble.flat, half.ensemble.flat, atol=1e-7)


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


@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
@pytest.mark.parametrize("size", [1, 7, 40_003])
@pytest.mark.parametrize("options", OPTIMISERS, ids=str)
def test_the_own_sgd_has_the_bits_of_torchs(options, size, dtype):
    """Ends of vectors, of blocks and of threads' parts; the products that are rounded by themselves."""
    given = {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 5e-4} | options
    parameters, velocity = torch.randn(3, size, dtype=dtype), torch.zeros(3, size, dtype=dtype)
    p = parameters.clone().requires_grad_()
    optimizer = torch.optim.SGD([p], **given)
    for _ in range(3):
        p.grad = torch.randn(3, size, dtype=dtype)
        descend_(parameters, velocity, p.grad.clone(), SGD(**given))
        optimizer.step()
        assert torch.equal(parameters, p.detach())
