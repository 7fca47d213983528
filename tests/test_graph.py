"""Steps as CUDA graphs: the bookkeeping by a stand-in that runs again what was recorded; on a GPU the real thing."""

import copy
import itertools
import warnings

import pytest
import torch
from torch import nn
from trainer_cases import batch, net, same_state, state_of

import forde_fast as ff
from forde_fast import graph
from forde_fast.strategies import Strategy
from forde_fast.testing import make_pca

gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


class StandIn:
    """In place of CUDA: a launch runs what was recorded, into the tensors that the first launch gave."""

    def __init__(self):
        self.recorded = self.launched = 0

    def record(self, run, device, pool):
        self.recorded += 1
        static = []

        def launch():
            self.launched += 1
            log = run()
            if static:
                for own, now in zip(static[0], log, strict=True):
                    own.copy_(now)
            else:
                static.append(log._replace(**{name: t.clone() for name, t in log._asdict().items()}))
            return static[0]

        return launch, object()


@pytest.fixture
def stand_in(monkeypatch):
    stand_in = StandIn()
    monkeypatch.setattr(graph, "why_not", lambda *_: "")
    monkeypatch.setattr(graph, "waits_in", lambda run: (run(), ""))
    monkeypatch.setattr(graph, "record", stand_in.record)
    return stand_in


def pair(device="cpu", dropout=0.3, **options):
    """The same trainer twice, without and with graphs."""
    ensemble = ff.Ensemble(lambda: net(dropout), 3, seed=4).to(device)
    options = {"lengthscale": make_pca(12), "repulsion_weight": 3.0, "lr": 0.05, **options}
    twin = copy.deepcopy(ensemble)
    return [ff.Trainer(twin, cuda_graph=False, **options), ff.Trainer(ensemble, cuda_graph=True, **options)]


def assert_same(one, other):
    assert same_state(one.ensemble, state_of(other.ensemble))
    assert torch.equal(one.velocity, other.velocity)
    assert one.steps == other.steps


def run_both(trainers, steps, sizes=(6,), rates=lambda step: 1.0):
    """The logs of both, from the same batches, dropout masks and learning rates."""
    device = trainers[0].ensemble.flat.device
    data = [batch(size) for _, size in zip(range(steps), itertools.cycle(sizes), strict=False)]
    logs = []
    for trainer in trainers:
        torch.manual_seed(8)
        logs.append([trainer.step(x.to(device), y.to(device), rates(i)) for i, (x, y) in enumerate(data)])
    return logs


OPTIONS = {
    "forde": {},
    "de": {"method": "de"},
    "lazy": {"repulsion_every": 3},
    "few samples": {"repulsion_samples": 4},
    "stacked": {"strategy": "stacked"},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_the_same_bytes_as_step_by_step(options, stand_in):
    """Over measuring steps, learning rates that change, and batches of two sizes."""
    trainers = pair(**options)
    logs = run_both(trainers, 45, (6, 6, 5), lambda step: 1 / (1 + step))
    assert_same(*trainers)
    for one, other in zip(*logs, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
    assert stand_in.launched > 20
    assert trainers[1].strategy_report.endswith("; CUDA graph")


def test_a_kind_of_step_is_recorded_the_third_time_that_it_comes(stand_in):
    trainer = pair()[1]
    for step in range(31):
        trainer.step(*batch())
        # 0 and 10 measure: step by step; 1 and 2 are the first plain ones; 3 is recorded, and so is 20
        assert stand_in.recorded == (step >= 3) + (step >= 20)
        assert stand_in.launched == max(0, step - 2) - (step >= 10)
    trainer.step(*batch(5))
    assert stand_in.recorded == 2


def test_shapes_without_end_are_not_recorded(stand_in):
    trainers = pair(method="de")
    run_both(trainers, 3 * 20, range(2, 22))
    assert stand_in.recorded == graph.MOST
    assert_same(*trainers)


def test_what_changes_between_steps_is_recorded_anew(stand_in):
    def change(what):
        for trainer in trainers:
            what(trainer)
        run_both(trainers, 5)
        assert_same(*trainers)

    trainers = pair()
    change(lambda trainer: None)
    change(lambda trainer: trainer.ensemble.double().float())
    change(lambda trainer: trainer.ensemble.member(1)[2].eval())
    change(lambda trainer: setattr(trainer, "sgd", ff.trainer.SGD(0.01, 0.5)))
    assert stand_in.recorded == 4


def test_logs_are_the_callers(stand_in):
    trainer = pair()[1]
    logs = [trainer.step(*batch()) for _ in range(8)]
    assert len({float(log.cross_entropy) for log in logs}) == 8


def test_a_state_goes_on_byte_for_byte(stand_in):
    (whole, other), data = pair(), [batch() for _ in range(5)]
    whole.fit(data, 4)
    states = []
    other.fit(data, 4, on_epoch=lambda epoch, log: states.append(copy.deepcopy(other.state_dict())))
    resumed = pair()[1]
    resumed.load_state_dict(states[1])
    resumed.fit(data, 4)
    assert_same(whole, other)
    assert_same(whole, resumed)


def test_what_cannot_be_recorded_is_computed_as_usual(stand_in, monkeypatch):
    def fails(run, device, pool):
        try:
            raise RuntimeError("not permitted\nwhen capturing")
        finally:
            raise RuntimeError("invalidated")

    for name, stand in (("record", fails), ("waits_in", lambda run: (run(), "it waits"))):
        with monkeypatch.context() as patched:
            patched.setattr(graph, name, stand)
            trainers = pair()
            run_both(trainers, 8)
        assert_same(*trainers)
        reason = "RuntimeError: not permitted when capturing" if name == "record" else "it waits"
        assert trainers[1].strategy_report == f"loop; no CUDA graph: {reason}"


def test_reasons_that_are_known_beforehand():
    cuda, loop = torch.device("cuda"), Strategy()
    assert graph.why_not(cuda, loop, None) == ""
    assert graph.why_not(torch.device("cpu"), loop, None) == "it needs a CUDA device"
    assert "optimiser" in graph.why_not(cuda, loop, object())
    assert graph.why_not(cuda, Strategy("streams"), None) == ""
    assert "members_at_a_time" in graph.why_not(cuda, Strategy(members_at_a_time=1), None)
    trainers = pair()
    run_both(trainers, 3)
    assert_same(*trainers)
    assert trainers[1].strategy_report == "loop; no CUDA graph: it needs a CUDA device"


def test_what_waits_is_found_and_other_warnings_pass(monkeypatch):
    modes = []
    monkeypatch.setattr(torch.cuda, "get_sync_debug_mode", lambda: 0)
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)

    def run():
        warnings.warn("called a synchronizing CUDA operation", stacklevel=1)
        warnings.warn("something else", stacklevel=1)
        return 5

    with pytest.warns(UserWarning, match="something else") as seen:
        log, reason = graph.waits_in(run)
    assert len(seen) == 1
    assert log == 5
    assert reason.startswith(f"a step waits for the device ({__file__}, line ")
    assert modes == ["warn", 0]
    assert graph.waits_in(lambda: 6) == (6, "")


def test_channels_last_changes_nothing_but_rounding():
    def model():
        return nn.Sequential(nn.Conv2d(3, 20, 2), nn.BatchNorm2d(20), nn.ReLU(), nn.Flatten(), nn.Linear(20, 4))

    trainers = [ff.Trainer(ff.Ensemble(model, 3).double(), channels_last=last) for last in (None, True)]
    for x, y in [batch(dtype=torch.float64) for _ in range(3)]:
        for trainer in trainers:
            trainer.step(x, y)
    one, other = (trainer.ensemble.flat for trainer in trainers)
    assert torch.allclose(one, other, rtol=1e-9, atol=1e-12)
    assert [trainer._strategy.channels_last for trainer in trainers] == [False, True]


@gpu
@pytest.mark.parametrize("precision", ["full", "bf16"])
@pytest.mark.parametrize("options", [*OPTIONS.values(), {"strategy": "streams"}], ids=[*OPTIONS, "streams"])
def test_gpu_graphs_are_the_same_steps(options, precision):
    trainers = pair("cuda", dropout=0.0, precision=precision, **options)
    run_both(trainers, 45, (6, 6, 5), lambda step: 1 / (1 + step))
    assert trainers[1].strategy_report.endswith("; CUDA graph"), trainers[1].strategy_report
    one, other = (trainer.ensemble.flat for trainer in trainers)
    assert torch.allclose(one, other, rtol=1e-5 if precision == "full" else 1e-2, atol=1e-6)


@gpu
def test_gpu_dropout_masks_are_the_same():
    trainers = pair("cuda")
    run_both(trainers, 25)
    assert trainers[1]._recorder is not None
    assert torch.allclose(trainers[0].ensemble.flat, trainers[1].ensemble.flat, rtol=1e-4, atol=1e-5)


@gpu
@pytest.mark.parametrize("recorded", [False, True])
def test_gpu_steps_do_not_wait(recorded):
    trainer = pair("cuda", method="forde")[recorded]
    x, y = (t.cuda() for t in batch())
    for _ in range(21):
        trainer.step(x, y)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(11):
            trainer.step(x, y)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@gpu
def test_gpu_member_that_waits():
    class Waits(nn.Module):
        def forward(self, x):
            return x * (2.0 if float(x.sum()) > 1e9 else 1.0)

    ensemble = ff.Ensemble(lambda: nn.Sequential(net(), Waits()), 2).cuda()
    trainer = ff.Trainer(ensemble, cuda_graph=True)
    for _ in range(5):
        trainer.step(*(t.cuda() for t in batch()))
    assert "no CUDA graph: a step waits for the device" in trainer.strategy_report
