"""A finished run read back: other data are seen as its networks know them, and what was changed is noticed."""

import csv
import io
import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

import forde_fast as ff
from forde_fast import cli
from forde_fast.run import open_run
from forde_fast.trained import TrainedOn

COLOURS = {"birds": (220, 60, 60), "cats": (60, 220, 60), "dogs": (60, 60, 220)}
SMALL = (
    "--model",
    "cnn",
    "--width",
    "4",
    "--members",
    "2",
    "--epochs",
    "3",
    "--batch-size",
    "8",
    "--repulsion-weight",
    "1",
)


def pets(folder, dark=False, parts=(("train", 12), ("test", 5)), **names):
    """Noise around a colour for each class; `names` rename classes."""
    draw = np.random.default_rng(0)
    for part, count in parts:
        for name, colour in COLOURS.items():
            own = folder / part / names.get(name, name)
            own.mkdir(parents=True)
            for i in range(count):
                pixels = np.clip(np.array(colour) + draw.integers(-50, 50, (8, 8, 3)), 0, 255)
                Image.fromarray((pixels // (4 if dark and part == "train" else 1)).astype(np.uint8)).save(
                    own / f"{i}.png"
                )
    return folder


@pytest.fixture(autouse=True)
def few_corruptions(monkeypatch):
    monkeypatch.setattr("forde_fast.run.CORRUPTIONS", ("contrast",))


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run's folder, and its data's."""
    folder = tmp_path_factory.mktemp("trained")
    data = pets(folder / "pets")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("forde_fast.run.CORRUPTIONS", ("contrast",))
        cli.main(["train", "--data", "folder", "--data-dir", str(data), *SMALL, "--out", str(folder / "run")])
    return folder / "run", data


def nll(run):
    return run.evaluate()["clean"]["nll"]


def test_a_run_predicts_without_its_data(trained, tmp_path, capsys):
    out, data = trained
    moved = shutil.copytree(out, tmp_path / "moved")
    settings = moved / "config.toml"
    settings.write_text(settings.read_text().replace(str(data), "/nowhere"))
    run = ff.load_run(moved)
    assert run.trained_on.classes == tuple(COLOURS)
    own = open_run(out)
    found = run.predict(own.test_images)
    assert torch.equal(found.members, own.predict(own.test_images))
    capsys.readouterr()

    files = [data / "test" / "cats", data / "test" / "dogs" / "0.png"]
    assert cli.main(["predict", str(moved), *map(str, files)]) == 0
    rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert [row["image"] for row in rows] == [*(str(files[0] / f"{i}.png") for i in range(5)), str(files[1])]
    assert [row["class"] for row in rows] == ["cats"] * 5 + ["dogs"]
    np.save(tmp_path / "x.npy", own.test_images.numpy())
    assert cli.main(["predict", str(moved), str(tmp_path / "x.npy"), "--json"]) == 0
    for row, mean, total in zip(json.loads(capsys.readouterr().out), found.mean, found.total, strict=True):
        assert list(row["probabilities"].values()) == pytest.approx(mean.tolist())
        assert row["total"] == pytest.approx(float(total))


def test_grey_and_rgb_are_made_what_the_run_knows(trained, tmp_path):
    Image.new("L", (8, 8), 100).save(tmp_path / "grey.png")
    Image.new("RGB", (8, 8), (100, 100, 100)).save(tmp_path / "rgb.png")
    for shape in ((8, 8), (8, 8, 1), (8, 8, 3)):
        _, images = ff.data.read_unlabelled([tmp_path], shape)
        assert images.shape == (2, *shape)
        assert (images == 100).all()


@pytest.mark.parametrize("given", ["nothing", "folder", "size", "text", "numbers"])
def test_what_cannot_be_predicted_is_one_line(trained, tmp_path, capsys, given):
    (tmp_path / "folder").mkdir()
    Image.new("L", (9, 8)).save(tmp_path / "size", "png")
    (tmp_path / "text").write_text("an image")
    np.save(tmp_path / "numbers.npy", np.zeros((3, 8, 8), np.uint8))
    path = tmp_path / ("numbers.npy" if given == "numbers" else given)
    with pytest.raises(SystemExit) as stop:
        cli.main(["predict", str(trained[0]), str(path)])
    error = capsys.readouterr().err
    assert stop.value.code == 2
    assert error.count("\n") == 1
    assert "expected" in error


@pytest.mark.parametrize("images", [torch.zeros(2, 8, 8, dtype=torch.uint8), torch.zeros(0, 8, 8, 3), [[0.0]]])
def test_images_of_another_shape_are_refused(trained, images):
    with pytest.raises((TypeError, ValueError), match=r"^images: expected"):
        ff.load_run(trained[0]).predict(images)


def test_other_data_are_normalised_as_the_training_images(trained, tmp_path):
    """The same test images beside darker training images: the scores are the same."""
    out, _ = trained
    own, other = open_run(out), open_run(out, data_dir=str(pets(tmp_path / "dark", dark=True)))
    assert other.normalisation == own.normalisation
    assert torch.equal(other.test_images, own.test_images)
    assert nll(other) == nll(own)


def test_classes_are_known_by_their_names(trained, tmp_path, capsys):
    out, _ = trained
    some = pets(tmp_path / "some")
    for part in ("train", "test"):
        shutil.rmtree(some / part / "birds")
    run = open_run(out, data_dir=str(some))
    assert sorted(set(run.test_labels.tolist())) == [1, 2]  # cats and dogs of three
    renamed = pets(tmp_path / "renamed", cats="zebras")
    with pytest.raises(SystemExit):
        cli.main(["evaluate", str(out), "--data-dir", str(renamed)])
    assert "data_dir: expected classes of the run, birds, cats, dogs, got zebras" in capsys.readouterr().err


def test_evaluate_says_what_it_scores(trained, capsys):
    capsys.readouterr()
    assert cli.main(["evaluate", str(trained[0])]) == 0
    assert "36 training, 15 test samples of 8 x 8 RGB, 3 classes" in capsys.readouterr().err


def test_changed_data_are_not_gone_on_with(tmp_path, capsys):
    data, out = pets(tmp_path / "pets"), tmp_path / "out"
    flags = ["--data", "folder", "--data-dir", str(data), *SMALL, "--out", str(out)]
    assert cli.main(["train", *flags]) == 0
    (out / "metrics.json").unlink()  # as if it had been stopped before
    for path in (data / "train" / "cats").iterdir():
        Image.fromarray(255 - np.asarray(Image.open(path))).save(path)
    with pytest.raises(SystemExit) as stop:
        cli.main(["train", "--resume", "--out", str(out)])
    assert stop.value.code == 2
    assert "data_dir: expected the data that the run was begun with (mean" in capsys.readouterr().err


@pytest.mark.parametrize(
    "content", ["", "[]", "{}", '{"classes": 3}', '{"classes": ["a"], "shape": ["x"]}', "[" * 9999]
)
def test_a_damaged_file_of_facts_is_one_line(tmp_path, content):
    (tmp_path / "data.json").write_text(content)
    with pytest.raises(ValueError, match=r"data\.json: expected what a run keeps of its data, got "):
        TrainedOn.read(tmp_path)


# ---------------------------------------------------------------- compare


TINY = ("--data", "digits", "--members", "2", "--width", "8", "--train-size", "128", "--test-size", "20")


def test_a_resumed_comparison_has_the_methods_and_settings_of_the_first(tmp_path):
    out = tmp_path / "both"
    assert cli.main(["compare", *TINY, "--epochs", "1", "--methods", "forde-identity,de", "--out", str(out)]) == 0
    for name in (
        "log.jsonl",
        "epochs.jsonl",
        "checkpoint.safetensors",
        "metrics.json",
    ):  # as if it had not been begun
        (out / "de" / name).unlink()
    assert cli.main(["compare", "--resume", "--out", str(out)]) == 0
    assert sorted(path.name for path in out.iterdir() if path.is_dir()) == ["de", "forde-identity"]
    assert cli.main(["compare", "--resume", "--methods", "forde-cosine", "--out", str(out)]) == 0
    kept = [(out / name / "config.toml").read_text() for name in ("de", "forde-cosine")]
    assert kept[1] == kept[0].replace('"de"', '"forde-cosine"').replace("/de", "/forde-cosine")


def test_a_comparison_leaves_other_runs_alone(tmp_path, capsys):
    out = tmp_path / "one"
    assert cli.main(["train", *TINY, "--epochs", "1", "--out", str(out)]) == 0
    before = (out / "training.png").read_bytes()
    with pytest.raises(SystemExit):
        cli.main(["compare", *TINY, "--out", str(out)])
    assert "out: expected a folder without a run" in capsys.readouterr().err
    assert (out / "training.png").read_bytes() == before


def test_a_picture_of_ones_own_is_not_written_over(tmp_path, capsys):
    (tmp_path / "training.png").write_bytes(b"mine")
    with pytest.raises(SystemExit):
        cli.main(["train", *TINY, "--epochs", "1", "--out", str(tmp_path)])
    assert "which holds training.png" in capsys.readouterr().err


def test_photos_of_any_size_are_predicted_as_they_were_trained_on(tmp_path, capsys):
    data, out = pets(tmp_path / "pets"), tmp_path / "out"
    assert (
        cli.main(
            ["train", "--data", "folder", "--data-dir", str(data), "--image-size", "6", *SMALL, "--out", str(out)]
        )
        == 0
    )
    wide = Image.fromarray(np.asarray(Image.open(data / "test" / "cats" / "0.png")).repeat(4, 0).repeat(4, 1)).resize(
        (64, 32)
    )
    wide.save(tmp_path / "wide.png")
    capsys.readouterr()
    assert cli.main(["predict", str(out), str(tmp_path / "wide.png")]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 2
    assert ff.load_run(out).trained_on.shape == (6, 6, 3)
