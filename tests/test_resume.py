"""Stopping and going on: a training that was interrupted ends byte for byte as one that was not."""

import copy
import errno
import gc
import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from torch import nn

import forde_fast as ff
from forde_fast import cli
from forde_fast.checkpoint import Checkpoints, pack, read_member, unpack
from forde_fast.files import write
from forde_fast.signals import Interrupted, StopSignals
from forde_fast.watching import JSONLines


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


# ---------------------------------------------------------------- states on disk


def test_states_come_back_as_they_were(tmp_path):
    one = trainer(OPTIMIZERS["adam"])
    one.fit(LOADERS["list"](), 1)
    state = one.state_dict()
    again = trainer(OPTIMIZERS["adam"])
    again.load_state_dict(unpack(pack(state)))
    assert pack(again.state_dict()) == pack(state)


def test_packing_leaves_no_tensors_to_the_garbage_collector():
    """They would be a copy of the whole state, kept until it comes."""
    gc.collect()
    gc.set_debug(gc.DEBUG_SAVEALL)
    try:
        pack({"velocity": torch.zeros(2, 3), "more": [torch.zeros(2), {"steps": 1}]})
        gc.collect()
        assert not [one for one in gc.garbage if isinstance(one, torch.Tensor)]
    finally:
        gc.set_debug(0)
        gc.garbage.clear()


def test_the_last_two_are_kept_and_a_damaged_one_is_passed_over(tmp_path):
    one, kept = trainer(), Checkpoints(tmp_path / "checkpoints")
    assert kept.check() == (None, [])
    for _ in range(4):
        one.step(*LOADERS["list"]()[0])
        kept.write(one.state_dict())
    first, last = kept.paths()
    assert (first.name[:8], last.name[:8]) == ("00000003", "00000004")
    assert kept.check() == (4, [])
    assert kept.read(4)["steps"] == 4
    assert torch.equal(read_member(kept.folder, 1)["1.weight"], one.ensemble.member(1)[1].weight)
    content = bytearray(last.read_bytes())
    content[-5] ^= 1
    last.write_bytes(content)
    with pytest.raises(ValueError, match=r"^folder: expected whole checkpoints, got .*of another checksum"):
        read_member(kept.folder, 1)
    assert kept.check() == (3, [last])
    kept.write({**one.state_dict(), "steps": 5})
    assert [path.name[:8] for path in kept.paths()] == ["00000003", "00000005"]  # the damaged one counts no more
    for path in kept.paths():
        path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"^checkpoints: expected one that is whole, got only damaged ones in "):
        kept.check()


@pytest.fixture
def full_disk(monkeypatch):
    """From the moment it is set, every fsync finds the disk full."""
    full = []

    def fsync(descriptor):
        if full:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.fsync", fsync)
    return full


def test_a_full_disk_leaves_what_was_kept(tmp_path, full_disk):
    one, kept = trainer(), Checkpoints(tmp_path)
    kept.write(one.state_dict())
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    full_disk.append(True)
    with pytest.raises(OSError, match="No space left"):
        kept.write({**one.state_dict(), "steps": 9})
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_slow_disk_does_not_hold_up_the_steps(tmp_path, monkeypatch):
    """The write waits for steps that come after it was begun, and what it writes is the state from before them."""
    one, kept, stepped = trainer(), Checkpoints(tmp_path), threading.Event()

    def slow(path, content):
        assert stepped.wait(60), "no step was done while the checkpoint was written"
        write(path, content)

    monkeypatch.setattr("forde_fast.checkpoint.write", slow)
    one.step(*LOADERS["list"]()[0])
    before = one.ensemble.flat.clone()
    kept.begin(one.state_dict())
    for _ in range(3):
        one.step(*LOADERS["list"]()[1])
    assert kept.steps() == []
    stepped.set()
    kept.finish()
    again = trainer()
    again.load_state_dict(kept.read(1))
    assert torch.equal(again.ensemble.flat, before)
    assert not torch.equal(one.ensemble.flat, before)


# ---------------------------------------------------------------- runs


TINY = [
    *("--data", "digits", "--train-size", "256", "--test-size", "200", "--width", "16"),
    *("--members", "2", "--epochs", "3", "--batch-size", "64"),
]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "whole"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("forde_fast.run.CORRUPTIONS", ("contrast",))
        patch.setattr("forde_fast.run.Run._draw", lambda self: None)
        assert cli.main(["train", *TINY, "--out", str(folder)]) == 0
        yield folder


def stopped(*arguments):
    with pytest.raises(SystemExit) as stop:
        cli.main(["train", *map(str, arguments)])
    return stop.value.code


def at_step(monkeypatch, step, act):
    """Let `act` happen after the step's line of the log was noted."""
    original = JSONLines.__call__

    def call(self, epoch, log):
        original(self, epoch, log)
        if self.trainer.steps == step:
            act()

    monkeypatch.setattr(JSONLines, "__call__", call)


def same_run(folder, other):
    return all(
        (folder / name).read_bytes() == (other / name).read_bytes()
        for name in ("checkpoint.safetensors", "log.jsonl")
    )


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_keeps_everything_and_says_how_to_go_on(number, tmp_path, undisturbed, monkeypatch, capsys):
    folder, before = tmp_path / "stopped", signal.getsignal(number)
    with monkeypatch.context() as patch:
        at_step(patch, 6, lambda: os.kill(os.getpid(), number))
        assert stopped(*TINY, "--out", folder) == 128 + number
    said = capsys.readouterr().err
    assert (
        f"interrupted by {number.name}, all is kept; go on with: forde-fast train --resume --out {folder}\n" in said
    )
    assert [path.name[:8] for path in Checkpoints(folder / "checkpoints").paths()] == ["00000004", "00000006"]
    assert signal.getsignal(number) is before
    assert cli.main(["train", "--resume", "--out", str(folder)]) == 0
    assert "going on after step 6" in capsys.readouterr().err
    assert same_run(folder, undisturbed)
    assert not (folder / "checkpoints").exists()


def test_the_time_before_a_stop_counts(tmp_path, undisturbed, monkeypatch):
    folder = tmp_path / "stopped"
    with monkeypatch.context() as patch:
        at_step(patch, 6, lambda: os.kill(os.getpid(), signal.SIGTERM))
        stopped(*TINY, "--out", folder)
    kept = Checkpoints(folder / "checkpoints")
    state = kept.read(6)
    assert state["seconds"] > 0
    kept.paths()[-1].unlink()
    kept.write({**state, "seconds": 1000.0})  # more than any rest takes
    assert cli.main(["train", "--resume", "--out", str(folder)]) == 0
    metrics = json.loads((folder / "metrics.json").read_text())
    assert 1000 < metrics["seconds"] < 2000
    assert metrics["members_x_images_per_second"] == pytest.approx(12 * 2 * 64 / metrics["seconds"])


def test_a_second_signal_stops_at_once(monkeypatch):
    with StopSignals() as stop:
        stop.waits = True
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.number == signal.SIGTERM
        with pytest.raises(Interrupted):
            os.kill(os.getpid(), signal.SIGTERM)


def test_a_full_disk_stops_a_run_in_one_line(tmp_path, undisturbed, monkeypatch, capsys, full_disk):
    folder = tmp_path / "full"
    with monkeypatch.context() as patch:
        at_step(patch, 6, lambda: full_disk.append(True))
        assert stopped(*TINY, "--out", folder) == 1
    assert (
        "No space left on device; go on with: forde-fast train --resume" in capsys.readouterr().err.splitlines()[-1]
    )
    full_disk.clear()
    (folder / "log.jsonl").write_text((folder / "log.jsonl").read_text() + '{"step": 5, "cro')  # cut in the middle
    assert cli.main(["train", *TINY, "--resume", "--out", str(folder)]) == 0
    assert same_run(folder, undisturbed)


def test_a_damaged_last_checkpoint_is_named_and_the_one_before_it_used(tmp_path, undisturbed, monkeypatch, capsys):
    folder = tmp_path / "damaged"
    with monkeypatch.context() as patch:
        at_step(patch, 10, lambda: os.kill(os.getpid(), signal.SIGTERM))
        stopped(*TINY, "--out", folder, "--checkpoint-every", 3)
    last = Checkpoints(folder / "checkpoints").paths()[-1]
    last.write_bytes(last.read_bytes()[:-100])
    assert cli.main(["train", "--resume", "--out", str(folder)]) == 0
    said = capsys.readouterr().err
    assert f"{last}: damaged" in said
    assert "going on after step 9" in said
    assert same_run(folder, undisturbed)


def test_a_run_in_a_renamed_folder_goes_on_there(tmp_path, undisturbed, monkeypatch):
    folder = tmp_path / "before"
    with monkeypatch.context() as patch:
        at_step(patch, 10, lambda: os.kill(os.getpid(), signal.SIGTERM))
        stopped(*TINY, "--out", folder, "--checkpoint-every", 3)
    (tmp_path / "runs").mkdir()
    renamed = folder.rename(tmp_path / "runs" / "first")  # the folder that is taken without --out
    monkeypatch.chdir(tmp_path)
    assert cli.main(["train", "--resume"]) == 0
    assert not folder.exists()
    assert same_run(renamed, undisturbed)


def test_a_finished_run_says_so(undisturbed, capsys):
    before = {path: path.read_bytes() for path in undisturbed.iterdir()}
    assert cli.main(["train", "--resume", "--out", str(undisturbed), "--json"]) == 0
    printed = capsys.readouterr()
    assert printed.err == f"{undisturbed}: this run is finished, there is nothing to resume\n"
    assert json.loads(printed.out)["forde-pca"] == json.loads((undisturbed / "metrics.json").read_text())
    assert {path: path.read_bytes() for path in undisturbed.iterdir()} == before


def test_a_run_goes_on_with_its_own_settings(tmp_path, undisturbed, capsys):
    assert stopped("--resume", "--out", undisturbed, "--lr", 0.2) == 2
    config = undisturbed / "config.toml"
    assert capsys.readouterr().err.endswith(f"error: lr: expected 0.1 as in {config}, got 0.2\n")
    assert stopped(*TINY, "--out", undisturbed) == 2
    assert "(--resume goes on with it)" in capsys.readouterr().err
    fresh = tmp_path / "fresh"
    assert cli.main(["train", *TINY, "--resume", "--out", str(fresh)]) == 0
    assert "nothing was kept yet, starting at the beginning" in capsys.readouterr().err
    assert same_run(fresh, undisturbed)


# ---------------------------------------------------------------- SIGKILL


def test_runs_killed_at_random_moments_end_as_one_that_was_not(tmp_path):
    """In a process of its own: its children start by fork, after the imports, and share no threads with pytest."""
    script = Path(__file__).with_name("kill_runs.py")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, script, tmp_path, "15"], env=environment, capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, done.stdout + done.stderr
    killed, steps = json.loads(done.stdout)
    assert killed == 15
    assert len(set(steps)) > 3  # they were at different places
