"""Tables of methods: what is tuned on what, runs that are skipped or taken up again, what the table says."""

import contextlib
import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy import stats

from forde_fast import cli
from forde_fast.data.corruptions import EXTRA, STANDARD, corrupt
from forde_fast.experiments import reproduce, summary
from forde_fast.experiments.corrupted import Corrupted
from forde_fast.experiments.reproduce import TUNING_SEED, Reproduction, Setting
from forde_fast.experiments.tables import TABLES, Table
from forde_fast.signals import Interrupted
from forde_fast.validation import NotFinite

TINY = Table("digits", "mlp", width=8, members=2, seeds=2, methods=("de", "forde-tuned"), published=("forde-tuned",),
             epochs=1, train_size=200, test_size=40, weight_decays=(5e-4, 5e-3), alphas=(0.4,))  # fmt: skip


@pytest.fixture(autouse=True)
def few_corruptions(monkeypatch):
    monkeypatch.setattr(reproduce, "CORRUPTIONS", ("contrast", "brightness"))
    monkeypatch.setattr(reproduce, "EXTRA", ("gaussian_blur",))
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def without_times(rows):
    times = ("seconds", "members_x_images_per_second")
    return {
        row: {**own, "metrics": [{k: v for k, v in m.items() if k not in times} for m in own["metrics"]]}
        for row, own in rows.items()
    }


def test_a_stopped_table_goes_on_and_a_finished_one_is_read(tmp_path, monkeypatch):
    unbroken = Reproduction(TINY, tmp_path / "whole")
    whole = unbroken.run()
    assert list(whole) == ["de", "forde-tuned", "forde-tuned-published"]
    assert whole["forde-tuned-published"]["setting"] == {"weight_decay": 5e-4, "repulsion_weight": 1.0, "alpha": 0.4}

    train, runs = reproduce.TableRun.train, []

    def stops(run, resume):
        runs.append(run)
        if len(runs) == 4:
            raise Interrupted(2)
        return train(run, resume)

    monkeypatch.setattr(reproduce.TableRun, "train", stops)
    stopped = Reproduction(TINY, tmp_path / "stopped")
    with pytest.raises(Interrupted):
        stopped.run()
    monkeypatch.setattr(reproduce.TableRun, "train", train)
    resumed = Reproduction(TINY, tmp_path / "stopped")
    assert without_times(resumed.run()) == without_times(whole)
    assert stopped.done + resumed.done == unbroken.done
    assert resumed.done > 0
    again = Reproduction(replace(TINY, seeds=1), tmp_path / "stopped")  # fewer seeds: nothing new to do
    assert again.run()["de"]["metrics"] == resumed.run()["de"]["metrics"][:1]
    assert again.done == 0


def test_runs_are_paired_and_tuning_uses_other_seeds_images_and_corruptions(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(Reproduction, "_finished", lambda self, kind, config: seen.append((kind, config)) or SCORES)
    Reproduction(TINY, tmp_path).run()
    table = [config for kind, config in seen if kind is reproduce.TableRun]
    tuning = [config for kind, config in seen if kind is reproduce.TunedRun]
    names = ["de", "forde-tuned", "forde-tuned"]
    assert [(c.method, c.seed) for c in table] == [(name, seed) for name in names for seed in (0, 1)]
    assert all(c.validation == 0 for c in table)
    assert {c.seed for c in tuning} == {TUNING_SEED}
    assert TUNING_SEED not in {c.seed for c in table}
    assert all(c.validation == TINY.validation for c in tuning)
    assert {c.weight_decay for c in tuning if c.method == "de"} == {5e-4, 5e-3}
    assert {c.repulsion_weight for c in tuning if c.method == "forde-tuned"} == {1.0, 5.0, 20.0, 80.0}
    assert len({c.out for c in table}) == len(table)


def test_a_published_setting_that_was_chosen_is_trained_once(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(Reproduction, "_finished", lambda self, kind, config: seen.append(config.out) or SCORES)
    rows = Reproduction(replace(TINY, methods=("de", "lit"), published=("de",)), tmp_path).run()
    assert list(rows) == ["de", "lit", "de-published"]
    assert rows["de-published"]["metrics"] == rows["de"]["metrics"]
    assert not any("de-published" in out for out in seen)


SCORES = {"validation": {"nll": 1.0, "accuracy": 0.5}, "validation_corrupted": {"nll": 1.0}, "clean": {}}


def test_tuning_searches_one_after_another(tmp_path, monkeypatch):
    """Of a loss whose best point is (5e-3, 5, 0.8)."""
    best = Setting(5e-3, 5.0, 0.8)
    distance = lambda self, method, own: sum((math.log(a) - math.log(b)) ** 2 for a, b in zip(own, best, strict=True))  # noqa: E731
    monkeypatch.setattr(Reproduction, "loss", distance)
    table = Reproduction(replace(TINY, alphas=(0.4, 0.8)), tmp_path)
    tuned = table.tune("forde-tuned")
    assert tuned == (best, 0.0, {"weight_decay": "highest", "alpha": "highest"})
    assert table.tune("forde-pca").setting == best._replace(alpha=0.4)
    assert table.tune("de").setting.weight_decay == 5e-3


def test_a_run_of_another_setting_does_not_stand_for_the_tuned_one(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(TABLES, "small", replace(TINY, methods=("de",), published=(), seeds=1))
    for sign in (1, -1):
        monkeypatch.setattr(Reproduction, "loss", lambda self, method, own, sign=sign: sign * own.weight_decay)
        with pytest.raises(SystemExit) if sign < 0 else contextlib.nullcontext() as stop:
            cli.main(["reproduce", "small", "--out", str(tmp_path)])
    assert stop.value.code == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert "weight_decay: expected 0.005 in" in error
    assert "got 0.0005 (tuned over other candidates" in error


def test_tuning_minimises_validation_scores_clean_and_under_corruptions_that_are_not_reported(tmp_path, monkeypatch):
    runs, losses = [], {TUNING_SEED: (1.0, 4.0), TUNING_SEED + 1: (8.0, 19.0)}

    def trained(run, resume):
        runs.append(run)
        scores = dict(zip(("validation", "validation_corrupted"), losses[run.config.seed], strict=True))
        metrics = {group: {"nll": nll, "accuracy": 0.5} for group, nll in scores.items()}
        run.folder.mkdir(parents=True)
        (run.folder / "metrics.json").write_text(json.dumps(metrics))
        return metrics

    monkeypatch.setattr(reproduce.TunedRun, "train", trained)
    monkeypatch.setattr(reproduce, "EXTRA", EXTRA)
    table = Reproduction(replace(TINY, tuning_seeds=2, spread=False), tmp_path)
    table.begun = 0.0
    setting = Setting(5e-4, 1.0, 0.4)
    assert table.loss("de", setting) == (1 + 4 + 8 + 19) / 4
    reported = table._test_sets(reproduce.TableRun(table.config("de", setting, 0, "run"), table.data))
    assert not set(EXTRA) & {*STANDARD, *reported["corrupted_grey"].names}
    for run in runs:
        copies, seen, predict = list(run.corrupted(run)), [], run.predict
        assert [part[:2] for part in copies] == [(name, severity) for name in EXTRA for severity in range(1, 6)]
        for name, severity, images, labels in copies:
            assert torch.equal(images, corrupt(run.valid_images, name, severity, 1, "grey"))
            assert torch.equal(labels, run.valid_labels)
        monkeypatch.setattr(run, "predict", lambda images: seen.append(images) or predict(images))  # noqa: B023
        run.evaluate()
        wanted = [run.valid_images, *(images for _, _, images, _ in copies)]
        assert all(torch.equal(a, b) for a, b in zip(seen, wanted, strict=True))
    assert not torch.equal(runs[0].valid_images, runs[1].valid_images)


def test_a_run_that_diverged_is_not_chosen(tmp_path, monkeypatch):
    def diverges(run, resume):
        run.folder.mkdir(parents=True)
        raise NotFinite("particles: expected finite numbers")

    monkeypatch.setattr(reproduce.TunedRun, "train", diverges)
    table = Reproduction(TINY, tmp_path)
    table.begun = 0.0
    assert table.loss("de", Setting(5e-4, 1.0, 0.4)) == math.inf
    assert table.loss("de", Setting(5e-4, 1.0, 0.4)) == math.inf
    assert (table.done, table.skipped) == (1, 1)
    with pytest.raises(ValueError, match=r"^method: expected a setting that can be trained, got de: all of them"):
        table.tune("de")


def test_an_error_is_no_divergence(tmp_path, monkeypatch):
    def fails(run, resume):
        raise ValueError("corrupted: expected 40 images")

    monkeypatch.setattr(reproduce.TunedRun, "train", fails)
    table = Reproduction(TINY, tmp_path)
    with pytest.raises(ValueError, match="expected 40 images"):
        table.loss("de", Setting(5e-4, 1.0, 0.4))
    assert not list(tmp_path.rglob("metrics.json"))


def test_another_table_in_the_folder(tmp_path):
    Reproduction(TINY, tmp_path).folder.joinpath("table.json").write_text(json.dumps({"data": "digits", "epochs": 3}))
    with pytest.raises(ValueError, match=r"^model: expected None as the table in"):
        Reproduction(TINY, tmp_path)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "photo.png").write_bytes(b"")
    with pytest.raises(FileExistsError, match=r"^out: expected a new folder, or one with a table"):
        Reproduction(TINY, tmp_path / "other")


def test_corrupted_files_in_the_place_of_copies(tmp_path):
    table = Reproduction(TINY, tmp_path / "made")
    table.run()
    cifar = tmp_path / "made" / "corrupted" / "cifar"
    np.save(cifar / "labels.npy", np.tile(table.data.test_labels[:40].numpy(), 5))
    given = Reproduction(replace(TINY, test_size=None), tmp_path / "given", corrupted_dir=str(cifar))
    run = reproduce.TableRun(given.config("de", Setting(5e-4, 1.0, 0.4), 0, "runs/de/seed0"), given.data)
    own = given._test_sets(run)
    assert list(own) == ["corrupted"]
    found = [(name, severity, torch.as_tensor(copies)) for name, severity, copies, _ in own["corrupted"]]
    images, labels = table.data.test_images[:40], table.data.test_labels[:40]
    wanted = list(Corrupted(cifar, images, labels, ("brightness", "contrast")))
    assert [part[:2] for part in found] == [part[:2] for part in wanted]
    assert all(torch.equal(a[2], b[2]) for a, b in zip(found, wanted, strict=True))


@pytest.mark.parametrize("spread", [False, True])
def test_corrupted_images_are_made_once(tmp_path, spread):
    images, labels = torch.randint(256, (13, 6, 5), dtype=torch.uint8), torch.arange(13)
    made = Corrupted(tmp_path, images, labels, ("contrast", "shot_noise"), "grey", spread, seed=3)
    first = list(made)
    assert [(name, severity) for name, severity, *_ in first] == [
        (n, s) for n in made.names for s in range(1, 6)
    ]  # fmt: skip
    for name, severity, found, own in first:
        part = slice(severity - 1, None, 5) if spread else slice(None)
        assert torch.equal(own, labels[part])
        assert torch.equal(found, corrupt(images[part], name, severity, 3, "grey"))
    written = (tmp_path / "contrast.npy").stat().st_mtime_ns
    assert all(torch.equal(a[2], b[2]) for a, b in zip(first, made, strict=True))
    assert (tmp_path / "contrast.npy").stat().st_mtime_ns == written
    assert len(np.load(tmp_path / "contrast.npy", allow_pickle=False)) == (13 if spread else 65)
    with pytest.raises(ValueError, match=r"contrast.npy: expected copies .* of the images, got .* of others"):
        list(Corrupted(tmp_path, images[:7], labels[:7], ("contrast",), "grey", spread, seed=3))


# ---------------------------------------------------------------- what the table says


def rows(offset=0.0, seeds=5):
    random = np.random.default_rng(0)

    def metrics(shift):
        group = {"accuracy": 0.8 + shift, "nll": 0.6 - shift, "ece": 0.05}
        return {"clean": dict(group), "corrupted": dict(group)}

    noise, own = random.normal(scale=0.02, size=seeds), random.normal(scale=0.001, size=seeds)
    setting = {"weight_decay": 5e-4, "repulsion_weight": 1.0, "alpha": 0.4}
    return {
        "de": {"method": "de", "setting": setting, "metrics": [metrics(n) for n in noise]},
        "forde-pca": {"method": "forde-pca", "setting": setting,
                      "metrics": [metrics(n + o + offset) for n, o in zip(noise, own, strict=True)]},
    }  # fmt: skip


def test_intervals_are_students():
    values = [0.3, 0.1, 0.25, 0.4]
    found = summary.interval(values)
    low, high = stats.ttest_1samp(values, 0).confidence_interval(0.95)
    assert found.mean - found.half == pytest.approx(low)
    assert found.mean + found.half == pytest.approx(high)
    assert found.sign == 1
    assert math.isinf(summary.interval([1.0]).half)
    assert (summary.Interval(0.9, 1.0).sign, summary.Interval(-1.1, 1.0).sign) == (0, -1)
    assert summary.interval([1.0]).sign == summary.interval([-1.0, 1.0]).sign == 0


@pytest.mark.parametrize(("offset", "verdict"), [(0.01, "shown"), (0.0, "not shown"), (-0.01, "the contrary")])
def test_small_differences_show_in_pairs(offset, verdict):
    """0.01 is half of what the seeds scatter by, and ten times what the paired differences do."""
    text = summary.as_markdown(rows(offset), "a table")
    line = next(line for line in text.splitlines() if line.startswith("| cA of forde-pca above de"))
    assert verdict in line
    assert ("**" in line) == (offset != 0)


def test_one_seed_says_nothing():
    text = summary.as_markdown(rows(seeds=1), "a table")
    assert "one seed says nothing" in text
    assert "From one seed" in text
    assert not any(word in text for word in ("±", "inf", "1 seeds", "1 differences"))


def test_rows_of_few_and_of_many_seeds():
    own = rows(seeds=3)
    assert "over 3 seeds" in summary.plain(own, "a table")
    own["de"]["metrics"] = own["de"]["metrics"][:1]
    text = summary.plain(own, "a table")
    assert "Means ± standard deviations over 1 to 3 seeds." in text
    lines = {line.split(" | ")[0]: line for line in text.split("## Settings")[0].splitlines()}
    assert "±" in lines["| forde-pca"]
    assert "±" not in lines["| de"]


@pytest.mark.parametrize(
    ("number", "text"), [(-0.004, "0.00"), (0.0, "0.00"), (-0.0, "0.00"), (0.006, "+0.01"), (-3.0, "-3.00")]
)
def test_zero_has_no_sign(number, text):
    assert summary.signed(number, 2) == text


# ---------------------------------------------------------------- the command


def test_the_command(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(TABLES, "small", replace(TINY, methods=("de", "lit"), published=(), seeds=1))
    folder = tmp_path / "small"
    assert cli.main(["reproduce", "small", "--out", str(folder)]) == 0
    printed = capsys.readouterr()
    assert printed.out.startswith("# small")
    assert (folder / "table.md").read_text() in printed.out
    assert "runs done" in printed.err
    assert cli.main(["reproduce", "small", "--out", str(folder), "--json"]) == 0
    assert set(json.loads(capsys.readouterr().out)) == {"de", "lit"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["mnist"], "table: expected one of small, digits-mlp"),
        (["small", "--methods", "de,svgd"], "methods: expected one of de"),
        (["small", "--methods", "lit"], "methods: expected de among them"),
        (["small", "--seeds", "0"], "seeds: expected a whole number >= 1"),
        (["cifar10", "--data-dir", "/nowhere"], "/nowhere"),
    ],
)
def test_bad_input_is_one_line(arguments, message, capsys, tmp_path):
    with pytest.raises(SystemExit) as stop:
        cli.main(["reproduce", *arguments, "--out", str(tmp_path / "out")])
    error = capsys.readouterr().err
    assert stop.value.code == 2
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()
