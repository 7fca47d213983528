"""The examples run, and do what they say."""

import importlib.util
import sys
import types
from pathlib import Path

import pytest

from forde_fast import cli

FOLDER = Path(__file__).parents[1] / "examples"


pytestmark = pytest.mark.usefixtures("one_thread")


def main_of(name):
    spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main


@pytest.mark.parametrize(
    ("name", "accuracy"),
    [("own_images", 0.8), ("own_network", 0.85), ("frozen_features", 0.85), ("functional_core", 0.9)],
)
def test_it_learns(name, accuracy):
    assert main_of(name)()["accuracy"] > accuracy


def test_regression_spreads_members_between_the_data(tmp_path):
    spread = main_of("regression_1d")(str(tmp_path / "figure.png"))
    (plain_gap, _), (gap, seen) = spread.values()
    assert gap > 1.3 * plain_gap
    assert gap > 3 * seen
    assert len(list(tmp_path.glob("*.png"))) == 2


def test_torchmetrics_agrees():
    found, own = main_of("with_torchmetrics")()
    assert found["accuracy"] == pytest.approx(own["accuracy"])
    assert found["ece"] == pytest.approx(own["ece"], abs=1e-5)


def test_tensorboard_reads_what_was_watched(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    main_of("watch_tensorboard")(str(tmp_path))
    events = EventAccumulator(str(tmp_path)).Reload()
    assert {"step/cross_entropy", "step/gradient_cosine", "epoch/cross_entropy"} <= set(events.Tags()["scalars"])
    assert [event.step for event in events.Scalars("epoch/cross_entropy")] == [10, 20, 30]


def test_wandb_is_given_steps_and_epochs(monkeypatch):
    logged = []
    stub = types.SimpleNamespace(log=lambda numbers, step: logged.append((step, numbers)), finish=lambda: None)
    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=lambda **options: stub))
    main_of("watch_wandb")()
    assert [step for step, numbers in logged if "gradient_cosine" in numbers] == [10, 20, 30, 40, 50, 60]
    assert [numbers["epoch"] for _, numbers in logged if "epoch" in numbers] == [0, 1, 2]


def test_wandb_that_is_not_installed_is_named(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(SystemExit) as stop:
        main_of("watch_wandb")
    assert stop.value.code == 2
    assert capsys.readouterr().err == "wandb: expected the package, from pip install wandb, got none installed\n"


def test_every_example_is_run():
    run = {"own_images", "own_network", "frozen_features", "functional_core", "regression_1d", "with_torchmetrics"}
    assert {path.stem for path in FOLDER.glob("*.py")} == run | {"watch_tensorboard", "watch_wandb"}


def test_runs_are_watched_too_or_say_what_is_missing(tmp_path, monkeypatch, capsys):
    tiny = ["--data", "digits", "--members", "2", "--epochs", "1", "--width", "8", "--test-size", "50"]
    with monkeypatch.context() as patch:
        patch.setattr("importlib.util.find_spec", lambda name: None)
        with pytest.raises(SystemExit) as stop:
            cli.main(["train", *tiny, "--tensorboard", "--out", str(tmp_path / "a")])
    error = capsys.readouterr().err
    assert (stop.value.code, error.count("\n")) == (2, 1)
    assert "tensorboard: expected the package, from pip install 'forde-fast[tensorboard]', got none" in error
    pytest.importorskip("tensorboard")
    monkeypatch.setattr("forde_fast.run.CORRUPTIONS", ("contrast",))
    assert cli.main(["train", *tiny, "--tensorboard", "--out", str(tmp_path / "b")]) == 0
    assert list((tmp_path / "b" / "tensorboard").glob("events.*"))
