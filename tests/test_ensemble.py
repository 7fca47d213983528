"""Ensemble: members as views of one buffer, whatever is done to them."""

import copy
import io
import pickle

import numpy as np
import pytest
import torch
from ensemble_cases import are_views, make, net, parameters_of
from torch import nn

import forde_fast as ff
from forde_fast.modes import evaluation_mode

F32, F64 = torch.float32, torch.float64


def test_parameters_are_views_of_flat():
    ensemble = make()
    assert ensemble.flat.shape == (3, sum(p.numel() for p in net().parameters()))
    assert are_views(ensemble)
    assert len(list(ensemble.parameters())) == 3 * 6
    assert not ensemble.flat.requires_grad
    assert len(ensemble) == 3


def test_state_dict_round_trip_keeps_the_views():
    one, other = make(seed=1), make(seed=2)
    one.train()(torch.randn(8, 6))  # other BatchNorm statistics than at the start
    assert not torch.equal(one.flat, other.flat)
    other.load_state_dict(one.state_dict())
    assert torch.equal(one.flat, other.flat)
    assert are_views(other)
    x = torch.randn(4, 6)
    assert torch.equal(one.predict_proba(x), other.predict_proba(x))
    with pytest.raises(ValueError, match=r"^assign: expected False"):
        other.load_state_dict(one.state_dict(), assign=True)


@pytest.mark.parametrize("cast", [lambda e: e.double(), lambda e: e.to(F64), lambda e: e.to("cpu", F64)])
def test_cast_keeps_the_views_and_the_parameters(cast):
    ensemble = make()
    before, identities = ensemble.flat.clone(), [id(p) for p in ensemble.parameters()]
    assert cast(ensemble) is ensemble
    assert ensemble.flat.dtype == F64
    assert torch.equal(ensemble.flat, before.double())
    assert [id(p) for p in ensemble.parameters()] == identities  # an optimiser still has them
    assert are_views(ensemble)
    assert ensemble(torch.randn(4, 6, dtype=F64)).dtype == F64


def through_a_file(ensemble):
    file = io.BytesIO()
    torch.save(ensemble, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda e: pickle.loads(pickle.dumps(e)),
    "torch.save": through_a_file,
    "inside something": lambda e: copy.deepcopy({"best": e})["best"],
}


@pytest.mark.parametrize("duplicate", COPIES.values(), ids=COPIES)
def test_copies_have_views_of_their_own(duplicate):
    ensemble = make()
    other = duplicate(ensemble)
    assert torch.equal(other.flat, ensemble.flat)
    assert are_views(other)
    kept = ensemble.flat.clone()
    other.flat.zero_()
    assert torch.equal(ensemble.flat, kept)
    assert are_views(ensemble)


def test_a_copied_member_parts_from_the_ensemble():
    ensemble = make()
    other = copy.deepcopy(ensemble.member(1))
    ensemble.flat.zero_()
    assert parameters_of(other).abs().sum() > 0


def test_member_zero_is_what_the_seed_gives():
    ensemble = make(members=4, seed=123)
    torch.manual_seed(123)
    for number in range(4):  # and the others are drawn on from there
        assert torch.equal(parameters_of(ensemble.member(number)), parameters_of(net()))
    assert torch.equal(ensemble.flat, make(members=4, seed=123).flat)
    assert torch.equal(ensemble.flat[:2], make(members=2, seed=123).flat)
    assert not torch.equal(ensemble.flat, make(members=4, seed=124).flat)


def test_global_random_state_is_untouched():
    state = torch.get_rng_state()
    make(seed=5)
    assert torch.equal(torch.get_rng_state(), state)

    def fails():
        torch.rand(3)
        raise RuntimeError("no model")

    with pytest.raises(RuntimeError, match="no model"):
        ff.Ensemble(fails, 2)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("members", [0, -1, True, False, 2.0, "3", None])
def test_members_must_be_a_whole_number(members):
    with pytest.raises(ValueError, match=r"^members: expected a whole number >= 1, got "):
        ff.Ensemble(net, members)


def test_members_may_be_a_numpy_integer():
    assert len(ff.Ensemble(net, np.int64(2))) == 2


def shared_layer():
    layer = nn.Linear(4, 3)
    return [nn.Sequential(nn.Linear(6, 4), layer) for _ in range(2)]


BAD_MODULES = [
    (lambda: [], ValueError, r"^modules: expected at least one, got none"),
    (lambda: [nn.Linear(2, 2)] * 2, ValueError, r"^modules: expected distinct modules, got one of them"),
    (lambda: [nn.Linear(2, 2), "no"], TypeError, r"^modules: expected torch.nn.Module, got str"),
    (lambda: [nn.ReLU(), nn.ReLU()], ValueError, r"^modules\[0\]: expected some trainable parameters"),
    (lambda: [net(), net().double()], ValueError, r"^modules: .*float32.*float64"),
    (
        lambda: [nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2).double()) for _ in range(2)],
        ValueError,
        r"^modules: expected one dtype and device, got torch.float32 on cpu, torch.float64 on cpu$",
    ),
    (shared_layer, ValueError, r"^modules: expected trainable parameters of their own"),
]


@pytest.mark.parametrize(("modules", "error", "message"), BAD_MODULES, ids=[m for *_, m in BAD_MODULES])
def test_bad_modules_are_named(modules, error, message):
    with pytest.raises(error, match=message) as raised:
        ff.Ensemble.from_modules(modules())
    assert "\n" not in str(raised.value)


def test_one_module_made_twice():
    module = net()
    with pytest.raises(ValueError, match=r"^modules: expected distinct modules"):
        ff.Ensemble(lambda: module, 2)
    with pytest.raises(TypeError, match=r"^make_model: expected a callable"):
        ff.Ensemble("mlp", 2)
    with pytest.raises(TypeError, match=r"^make_model: .* returns a new module each time, got Sequential"):
        ff.Ensemble(module, 2)
    with pytest.raises(ValueError, match=r"^seed: expected a whole number >= 0, got -1$"):
        ff.Ensemble(net, 2, seed=-1)


def test_bad_inputs_of_a_prediction_are_named():
    ensemble = ff.Ensemble(net, 2)
    with pytest.raises(TypeError, match=r"^x: expected a torch.Tensor, got ndarray$"):
        ensemble.predict_proba(np.zeros((2, 4)))
    with pytest.raises(ValueError, match=r"^batch_size: expected a whole number >= 1, got 0$"):
        ensemble.predict_proba(torch.zeros(2, 4), batch_size=0)


def test_from_modules_takes_the_modules_themselves():
    modules = [net(), net()]
    before = [parameters_of(module) for module in modules]
    ensemble = ff.Ensemble.from_modules(iter(modules))
    assert all(ensemble.member(i) is modules[i] for i in range(2))
    assert torch.equal(ensemble.flat, torch.stack(before))
    assert are_views(ensemble)


def test_frozen_parameters_stay_outside():
    def model():
        module = net()
        module[0].requires_grad_(False)
        return module

    ensemble = make(model=model)
    assert ensemble.flat.shape[1] == sum(p.numel() for p in net()[1:].parameters())
    frozen = ensemble.member(1)[0].weight.clone()
    ensemble.flat.zero_()
    assert torch.equal(ensemble.member(1)[0].weight, frozen)
    assert are_views(ensemble)
    assert are_views(ensemble.double())
    x = torch.randn(4, 6, dtype=F64)
    wanted = ensemble.eval().member(1)(x)
    assert torch.equal(ensemble.functional(1, ensemble.flat[1])(x), wanted)


def test_parameters_frozen_after_building_are_an_error_and_stay():
    ensemble = make()
    trainer, before = ff.Trainer(ensemble), ensemble.flat.clone()
    next(ensemble.member(1).parameters()).requires_grad_(False)
    with pytest.raises(ValueError, match=r"ensemble: expected .* \(freeze before .*, got some that are frozen"):
        trainer.step(torch.randn(4, 6), torch.randint(3, (4,)))
    assert torch.equal(ensemble.flat, before)


def exchanged(member):
    member[0] = nn.Linear(6, 5)


CHANGES = {
    "loaded by assignment": lambda member: member.load_state_dict(copy.deepcopy(member.state_dict()), assign=True),
    "cast and back": lambda member: member.double().float(),
    "other data": lambda member: setattr(member[0].weight, "data", member[0].weight.data.clone()),
    "another layer": exchanged,
    "a parametrization": lambda member: nn.utils.parametrizations.weight_norm(member[0]),
    "unfrozen": lambda member: member[2].requires_grad_(True),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_parameters_that_left_the_buffer_are_an_error(change):
    """They would not be trained, and nobody would see it."""

    def partly_frozen():
        network = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))
        network[2].requires_grad_(False)
        return network

    x, y = torch.randn(4, 6), torch.randint(3, (4,))
    ensemble = ff.Ensemble(partly_frozen, 2)
    trainer = ff.Trainer(ensemble)
    trainer.step(x, y)
    change(ensemble.member(1))
    message = r"^ensemble: expected the trainable parameters with which it was built .*, got .* in member 1"
    with pytest.raises(ValueError, match=message):
        trainer.fit([(x, y)], 1)
    trainer.steps = 10  # a step looks at every tenth
    with pytest.raises(ValueError, match=message):
        trainer.step(x, y)
    with pytest.raises(ValueError, match=message):
        ff.Trainer(ensemble)
    again = ff.Ensemble.from_modules([copy.deepcopy(member) for member in ensemble.members][1:])
    before = again.flat.clone()
    ff.Trainer(again, "de").step(x, y)
    assert not torch.equal(again.flat, before)


def test_frozen_parameters_may_be_shared():
    backbone = nn.Linear(6, 4).requires_grad_(False)
    ensemble = ff.Ensemble.from_modules([nn.Sequential(backbone, nn.Linear(4, 3)) for _ in range(2)])
    assert are_views(ensemble)
    assert ensemble.flat.shape == (2, 15)


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 6)
        self.second.weight = self.first.weight

    def forward(self, x):
        return self.second(self.first(x).relu())


def test_tied_parameters_are_one():
    ensemble = make(model=Tied)
    assert ensemble.flat.shape[1] == 36 + 6 + 6
    for each in (ensemble, copy.deepcopy(ensemble).double()):
        member = each.member(0)
        assert member.first.weight is member.second.weight
        assert are_views(each)
    x, theta = torch.randn(4, 6), ensemble.flat[0].clone().requires_grad_()
    (g,) = torch.autograd.grad(ensemble.functional(0, theta)(x).sum(), theta)
    ensemble.member(0)(x).sum().backward()
    assert torch.allclose(g, torch.cat([p.grad.flatten() for p in ensemble.member(0).parameters()]))


def test_functional_is_the_member_at_other_parameters():
    ensemble, other = make(), make(seed=9)
    x = torch.randn(8, 6)
    flat, buffers = ensemble.flat.clone(), {k: b.clone() for k, b in ensemble.member(1).named_buffers()}
    given = {k: b.clone() for k, b in other.member(2).named_buffers()}
    torch.manual_seed(3)  # the same dropout masks
    outputs = ensemble.functional(1, other.flat[2], given)(x)
    torch.manual_seed(3)
    assert torch.equal(outputs, other.member(2)(x))
    assert all(torch.equal(given[k], b) for k, b in other.member(2).named_buffers())  # updated in place
    assert all(torch.equal(buffers[k], b) for k, b in ensemble.member(1).named_buffers())
    assert torch.equal(ensemble.flat, flat)


def test_functional_without_buffers_uses_the_members_own():
    ensemble = make()
    ensemble.functional(1, ensemble.flat[1])(torch.randn(8, 6))
    counts = [int(member[1].num_batches_tracked) for member in ensemble.members]
    assert counts == [0, 1, 0]


def test_forward_stacks_the_members():
    ensemble = make(members=4).eval()
    x = torch.randn(7, 6)
    outputs = ensemble(x)
    assert outputs.shape == (4, 7, 3)
    assert all(torch.equal(outputs[i], ensemble.member(i)(x)) for i in range(4))


def test_predictions_are_the_mean_of_softmax_in_evaluation_mode():
    ensemble = make()
    ensemble.train()(torch.randn(8, 6))
    x = torch.randn(7, 6)
    state = {k: v.clone() for k, v in ensemble.state_dict().items()}
    proba, members = ensemble.predict_proba(x), ensemble.predict_members(x)
    assert all(torch.equal(v, state[k]) for k, v in ensemble.state_dict().items())  # no BatchNorm update
    softmax = torch.stack([copy.deepcopy(member).eval()(x).softmax(1) for member in ensemble.members])
    assert torch.allclose(members, softmax, atol=1e-6)
    assert torch.allclose(proba, softmax.mean(0), atol=1e-6)
    assert proba.shape == (7, 3)
    assert torch.allclose(proba.sum(1), torch.ones(7))
    assert not proba.requires_grad
    for batch_size in (1, 3, 7):
        assert torch.allclose(ensemble.predict_proba(x, batch_size), proba, atol=1e-6)


def test_predictions_of_large_samples_are_made_a_few_at_a_time():
    ensemble = ff.Ensemble(lambda: nn.Sequential(nn.Flatten(), nn.Linear(3 * 64 * 64, 3)), 2)
    seen = []
    ensemble.member(0).register_forward_pre_hook(lambda module, given: seen.append(len(given[0])))
    ensemble.predict_proba(torch.randn(70, 3, 64, 64))
    assert seen == [32, 32, 6]


def test_evaluation_mode_is_restored_for_each_submodule():
    ensemble = make()
    ensemble.member(1)[1].eval()  # one frozen BatchNorm
    ensemble.member(2).eval()
    modes = {name: m.training for name, m in ensemble.named_modules()}
    with evaluation_mode(ensemble):
        assert not any(m.training for m in ensemble.modules())
    assert {name: m.training for name, m in ensemble.named_modules()} == modes
    ensemble.predict_proba(torch.randn(4, 6))
    assert {name: m.training for name, m in ensemble.named_modules()} == modes
    with pytest.raises(RuntimeError):
        ensemble.predict_proba(torch.randn(4, 7))
    assert {name: m.training for name, m in ensemble.named_modules()} == modes


# ---------------------------------------------------------------- heads that differ


def with_head(head):
    backbone = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.ReLU()).requires_grad_(False)
    return nn.Sequential(backbone, head)


def heads():
    torch.manual_seed(3)
    return [
        with_head(nn.Linear(5, 3)),
        with_head(nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3))),
        with_head(nn.Sequential(nn.Linear(5, 3, bias=False), nn.BatchNorm1d(3))),
    ]


def test_members_with_different_heads_train_as_ever():
    plain, given = heads(), heads()
    ensemble = ff.Ensemble.from_modules(given)
    assert not ensemble.uniform
    assert make().uniform
    assert ensemble.flat.shape == (3, 5 * 7 + 7 + 7 * 3 + 3)
    assert all(
        torch.equal(a, b) for a, b in zip(ensemble.parameters(), nn.ModuleList(plain).parameters(), strict=True)
    )
    data = [(torch.randn(8, 6), torch.randint(3, (8,))) for _ in range(5)]
    trainer = ff.Trainer(ensemble, "de")
    for module in plain:
        sgd = torch.optim.SGD([p for p in module.parameters() if p.requires_grad], 0.1, 0.9, 0, 5e-4, nesterov=True)
        for x, y in data:
            sgd.zero_grad()
            nn.functional.cross_entropy(module(x), y).backward()
            sgd.step()
    for x, y in data:
        trainer.step(x, y)
    for own, other in zip(ensemble.members, plain, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(own.parameters(), other.parameters(), strict=True))
    copied = copy.deepcopy(ensemble).double()
    for member, row in zip(copied.members, copied.flat.neg_(), strict=True):
        size = len(parameters_of(member))
        assert torch.equal(parameters_of(member), row[:size])
        assert (row[size:] == 0).all()
    log = ff.Trainer(ensemble).step(*data[0])
    assert log.gradient_ratio > 0
    adam = ff.Trainer(ensemble, optimizer=lambda parameters: torch.optim.Adam(parameters))
    assert torch.isfinite(adam.step(*data[0]).cross_entropy)


def test_members_must_agree_on_their_outputs():
    ensemble = ff.Ensemble.from_modules([nn.Linear(6, 3), nn.Linear(6, 4)])
    with pytest.raises(ValueError, match=r"^modules: expected one shape of output, \[2, 3\], got \[2, 4\]$"):
        ff.Trainer(ensemble).step(torch.randn(2, 6), torch.zeros(2, dtype=torch.int64))


def test_prediction_is_mean_members_and_three_uncertainties():
    ensemble, x = make(3), torch.randn(9, 6)
    found = ensemble.predict(x, batch_size=4)
    members = torch.stack([copy.deepcopy(m).eval()(x).softmax(1) for m in ensemble.members])
    assert torch.allclose(found.members, members)
    assert torch.allclose(found.mean, members.mean(0))
    entropy = lambda p: -(p * p.log()).sum(-1)  # noqa: E731
    assert torch.allclose(found.total, entropy(members.mean(0)))
    assert torch.allclose(found.aleatoric, entropy(members).mean(0))
    divergence = (members * (members / members.mean(0)).log()).sum(-1).mean(0)  # another form of the same
    assert torch.allclose(found.epistemic, divergence, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_predicts_within_its_rounding(dtype):
    ensemble, x = make(3), torch.randn(9, 6)
    wanted = ensemble.predict(x)
    found = ensemble.to(dtype).predict(x.to(dtype))
    assert found.mean.dtype == found.epistemic.dtype == F32
    assert torch.allclose(found.members, wanted.members, atol=8 * torch.finfo(dtype).eps)
    assert torch.allclose(found.members.sum(-1), torch.ones(()))
