"""What stops a training says where, once, and what was kept before stays."""

import json

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import forde_fast as ff
from forde_fast import cli, guards
from forde_fast.checkpoint import Checkpoints
from forde_fast.strategies import LOOP, Graphs
from forde_fast.trainer import Trainer


def net():
    return nn.Sequential(nn.Flatten(), nn.Linear(12, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 4))


def batch():
    return torch.randn(6, 3, 2, 2), torch.randint(4, (6,))


class Breaking(nn.Module):
    """x + sqrt(0): finite forward, infinite backward."""

    def forward(self, x):
        return x + (x - x).abs().sqrt()


@pytest.mark.parametrize("method", ["forde", "de", "weight-rde"])
def test_a_number_that_is_not_finite_is_located(method):
    trainer = ff.Trainer(ff.Ensemble(net, 3), method)
    trainer.step(*batch())
    with torch.no_grad():
        trainer.ensemble.member(1)[4].weight[0, 0] = float("nan")
    before = trainer.ensemble.flat.clone()
    with pytest.raises(
        ValueError, match=r"^step 1, member 1, layer 4(\.\w+)?: expected a finite \w+.*, got nan or"
    ) as error:
        trainer.step(*batch())
    assert "\n" not in str(error.value)
    assert torch.equal(trainer.ensemble.flat.nan_to_num(7), before.nan_to_num(7))


@pytest.mark.parametrize("method", ["forde", "de"])
def test_a_gradient_that_is_not_finite_is_located(method):
    def breaking():
        return nn.Sequential(nn.Flatten(), nn.Linear(12, 8), Breaking(), nn.Linear(8, 4))

    members = [net(), net(), breaking()]
    trainer = ff.Trainer(ff.Ensemble.from_modules(members), method)
    with pytest.raises(ValueError, match=r"^step 0, member 2, layer 1(\.\w+)?: expected a finite gradient"):
        trainer.step(*batch())


def test_a_bandwidth_that_is_not_finite_is_named():
    log = ff.Log(*torch.zeros(len(ff.Log._fields)))._replace(bandwidth_median=torch.tensor(float("inf")))
    ensemble = ff.Ensemble(net, 2)
    with pytest.raises(ValueError, match=r"^step 4: expected a finite bandwidth_median, got inf"):
        guards.check_step(ensemble, torch.zeros_like(ensemble.flat), log, 4)


class Dying(torch.utils.data.Dataset):
    def __len__(self):
        return 12

    def __getitem__(self, i):
        if i == 7:
            raise OSError("the disk\nis gone")
        return torch.randn(3, 2, 2), i % 4


def test_a_loader_that_dies_is_reported_once():
    trainer, loader = ff.Trainer(ff.Ensemble(net, 2)), torch.utils.data.DataLoader(Dying(), 3)
    wanted = r"^loader: expected a batch \(x, y\) in epoch 0, batch 2, got OSError: the disk is gone$"
    with pytest.raises(RuntimeError, match=wanted):
        trainer.fit(loader, 2)
    assert trainer.steps == 2


def test_what_fits_follows_the_graphs_of_a_member():
    def wide():
        return nn.Sequential(nn.Flatten(), nn.Linear(12, 500), nn.ReLU(), nn.Linear(500, 4))

    one = ff.Ensemble(wide, 1)
    space = ff.InputGradients()

    def graph(samples):
        x, y = torch.randn(samples, 3, 2, 2), torch.randint(4, (samples,))
        graphs = Graphs(one, one.flat, None, x, y, F.cross_entropy, LOOP, space)
        graphs.forward()
        return graphs

    each = (guards.held(graph, 40) - guards.held(graph, 20)) / 20
    assert each >= 4 * 500  # at the least the hidden layer, in float32
    whole = guards.MARGIN * guards.held(graph, 64)
    device = torch.device("cpu")
    assert guards.what_fits(graph, 10, 64, device, int(3.5 * whole)).endswith("members_at_a_time = 3 fits")
    assert guards.what_fits(graph, 10, 64, device, int(99 * whole)).endswith("members_at_a_time = 9 fits")
    assert "batch_size = 3" in guards.what_fits(graph, 10, 64, device, int(0.6 * whole))
    assert "batch_size = 32 with" in guards.what_fits(graph, 1, 64, device, int(99 * whole))  # 64 was tried
    assert guards.what_fits(graph, 10, 64, device, 10).endswith("nothing fits")


def test_what_is_available_where_the_system_does_not_say(monkeypatch, tmp_path):
    known = guards.available(torch.device("cpu"))
    monkeypatch.setattr(guards, "Path", lambda path: tmp_path / "missing")
    assert guards.available(torch.device("cpu")) >= known > 0


TINY = ["--data", "digits", "--train-size", "128", "--test-size", "50", "--width", "8", "--members", "2"]


def stopped_at(monkeypatch, capsys, folder, step, act):
    """The last line of a run in which `act` happens to the trainer before a step."""
    original = Trainer.step

    def broken(self, *given):
        if self.steps == step:
            act(self)
        return original(self, *given)

    monkeypatch.setattr(Trainer, "step", broken)
    with pytest.raises(SystemExit) as stop:
        cli.main(["train", *TINY, "--epochs", "4", "--batch-size", "64", "--out", str(folder)])
    return stop.value.code, capsys.readouterr().err.splitlines()[-1]


def test_a_run_keeps_its_last_good_checkpoint(monkeypatch, capsys, tmp_path):
    def act(trainer):
        trainer.ensemble.flat[1] = float("nan")

    status, said = stopped_at(monkeypatch, capsys, tmp_path / "run", 5, act)
    assert status == 1
    assert "error: step 5, member 1, layer" in said
    step = Checkpoints(tmp_path / "run" / "checkpoints").check()[0]
    assert step == 4
    kept = Checkpoints(tmp_path / "run" / "checkpoints").read(step)
    assert all(torch.isfinite(tensor).all() for tensor in kept["ensemble"].values())


def test_a_state_that_is_not_finite_is_not_kept():
    ensemble = ff.Ensemble(net, 2)
    guards.check_state(ensemble, 3)
    with torch.no_grad():
        ensemble.member(1)[2].bias[1] = float("inf")
    with pytest.raises(ValueError, match=r"^step 3, member 1, layer 2\.bias: expected finite parameters"):
        guards.check_state(ensemble, 3)


def test_out_of_memory_says_what_would_fit(monkeypatch, capsys, tmp_path):
    def act(trainer):
        raise torch.OutOfMemoryError("CUDA out of memory")

    status, said = stopped_at(monkeypatch, capsys, tmp_path / "run", 5, act)
    assert status == 1
    assert "error: out of memory: a member's graph takes" in said
    assert "members_at_a_time = 1 fits; forde-fast train --resume" in said
    assert json.loads((tmp_path / "run" / "epochs.jsonl").read_text().splitlines()[-1])["step"] == 4
