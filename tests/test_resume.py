"""Stopping and going on: a training that was interrupted ends byte for byte as one that was not."""

import copy

import pytest
import torch
from torch import nn

import forde_fast as ff


def net(dropout=0.3):
    return nn.Sequential(nn.Flatten(), nn.Linear(12, 8), nn.BatchNorm1d(8), nn.Dropout(dropout), nn.Linear(8, 4))


class Noisy(torch.utils.data.Dataset):
    """Augmentation that draws from torch's generator while a batch is read."""

    x, y = torch.randn(20, 3, 2, 2), torch.randint(4, (20,))

    def __len__(self):
        return len(self.x)

    def __getitem__(self, i):
        return self.x[i] + 0.1 * torch.randn(3, 2, 2), self.y[i]


LOADERS = {
    "own": lambda: ff.data.Loader(Noisy.x, Noisy.y, 6, augment=True, padding=1, seed=3),
    "list": lambda: [(Noisy.x[i : i + 5], Noisy.y[i : i + 5]) for i in range(0, 20, 5)],
    "DataLoader": lambda: torch.utils.data.DataLoader(Noisy(), 6, shuffle=True),
}
OPTIMIZERS = {"sgd": None, "adam": lambda parameters: torch.optim.Adam(parameters, lr=1e-2)}


def trainer(optimizer=None, seed=0):
    return ff.Trainer(ff.Ensemble(net, 3, seed=1), optimizer=optimizer, seed=seed)


@pytest.mark.parametrize("optimizer", OPTIMIZERS.values(), ids=OPTIMIZERS)
@pytest.mark.parametrize("loader", LOADERS.values(), ids=LOADERS)
def test_a_fit_goes_on_from_any_step_and_any_epoch(loader, optimizer):
    states, logs = [], []
    whole = trainer(optimizer)
    keep = lambda *_: states.append(copy.deepcopy(whole.state_dict()))  # noqa: E731
    whole.fit(loader(), 3, on_step=lambda e, log: (logs.append((e, log)), keep()), on_epoch=lambda e, log: keep())
    assert {state["position"][1] for state in states} >= {0, 1, 2}
    for state in states:
        torch.manual_seed(torch.initial_seed() + 1)  # what the process drew before must not matter
        again, seen = trainer(optimizer, seed=99), []
        again.load_state_dict(state)
        again.fit(loader(), 3, on_step=lambda e, log: seen.append((e, log)))  # noqa: B023
        assert torch.equal(again.ensemble.flat, whole.ensemble.flat)
        assert all(torch.equal(a, b) for a, b in zip(again.ensemble.buffers(), whole.ensemble.buffers(), strict=True))
        assert seen == logs[state["steps"] :]
        assert (again.steps, again.epochs) == (whole.steps, 3)


def test_epochs_are_averaged_whole_however_interrupted():
    states, means, steps = [], [], []
    whole = trainer()
    whole.fit(
        LOADERS["own"](),
        2,
        on_step=lambda e, log: (steps.append(log), states.append(copy.deepcopy(whole.state_dict()))),
        on_epoch=lambda e, log: means.append(log),
    )
    wanted = torch.stack([torch.stack(log) for log in steps[3:]]).double().mean(0)
    assert torch.allclose(torch.stack(means[1]), wanted)
    again, seen = trainer(), []
    again.load_state_dict(states[4])
    again.fit(LOADERS["own"](), 2, on_epoch=lambda e, log: seen.append((e, log)))
    assert seen == [(1, means[1])]


def test_a_fit_that_failed_leaves_the_next_one_whole():
    one, data = trainer(), LOADERS["list"]()
    with pytest.raises(ZeroDivisionError):
        one.fit(data, 2, on_step=lambda e, log: 1 / (one.steps - 3))
    one.fit(data, 2)
    assert one.steps == 3 + 8


def test_states_that_do_not_fit_change_nothing():
    state = trainer().state_dict()
    wider = ff.Trainer(ff.Ensemble(lambda: nn.Sequential(nn.Flatten(), nn.Linear(12, 5)), 3))
    before = wider.ensemble.flat.clone()
    with pytest.raises(ValueError, match=r"^state: expected the ensemble's members\.0\.1\.bias \(5,\), got \(8,\)$"):
        wider.load_state_dict(state)
    assert torch.equal(wider.ensemble.flat, before)
    with pytest.raises(ValueError, match=r"^optimizer: expected this trainer's SGD, as in the state, got torch's$"):
        trainer(OPTIMIZERS["adam"]).load_state_dict(state)
    ended = {**state, "position": [3, 0, None]}
    one = trainer()
    one.load_state_dict(ended)
    with pytest.raises(ValueError, match=r"^epochs: expected at least 3, which are done, got 2$"):
        one.fit(LOADERS["list"](), 2)
