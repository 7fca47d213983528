"""The command line as a user meets it: runs, their folders, and one line for what is wrong."""

import importlib.metadata
import json
import os
import subprocess
import sys
import tempfile
import tomllib

import numpy as np
import pytest
import torch

from forde_fast import cli, plots
from forde_fast.config import TrainConfig, read, to_toml
from forde_fast.data import Normalisation
from forde_fast.run import Run, open_run

TINY = [
    "--data",
    "digits",
    "--members",
    "2",
    "--epochs",
    "2",
    "--width",
    "16",
    "--train-size",
    "256",
    "--test-size",
    "200",
]


@pytest.fixture(autouse=True)
def few_corruptions(monkeypatch):
    monkeypatch.setattr("forde_fast.run.CORRUPTIONS", ("contrast", "gaussian_noise"))


def run(*arguments):
    return cli.main([str(a) for a in arguments])


def refused(capsys, *arguments):
    with pytest.raises(SystemExit) as stop:
        run(*arguments)
    error = capsys.readouterr().err
    assert stop.value.code == 2
    assert error.count("\n") == 1
    return error


def test_a_run_leaves_its_folder(tmp_path, capsys):
    folder = tmp_path / "one"
    assert run("train", *TINY, "--method", "forde-tuned", "--out", folder, "--json") == 0
    printed = json.loads(capsys.readouterr().out)["forde-tuned"]
    metrics = json.loads((folder / "metrics.json").read_text())
    assert printed == metrics
    assert {"accuracy", "nll", "ece", "brier"} <= metrics["clean"].keys()
    assert len(metrics["clean"]["members"]) == 2
    assert set(metrics["corrupted"]["by_corruption"]) == {"contrast", "gaussian_noise"}
    assert set(metrics["corrupted_grey"]["by_corruption"]) == {"gaussian_noise"}
    assert metrics["strength"] == pytest.approx(20 * 256 / 128)
    log = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in log] == [1, 2, 3, 4]
    assert all(np.isfinite(list(entry.values())).all() for entry in log)
    assert log[-1]["cross_entropy"] < log[0]["cross_entropy"]
    assert tomllib.loads((folder / "config.toml").read_text())["method"] == "forde-tuned"
    assert all((folder / name).read_bytes()[:4] == b"\x89PNG" for name in ("training.png", "predictions.png"))


def test_evaluate_gives_what_training_gave(tmp_path, capsys):
    run("train", *TINY, "--out", tmp_path, "--json")
    trained = json.loads(capsys.readouterr().out)["forde-pca"]
    assert run("evaluate", tmp_path, "--json") == 0
    found = json.loads(capsys.readouterr().out)["forde-pca"]
    assert found == {name: trained[name] for name in found}


def test_a_run_of_another_machine_is_evaluated(tmp_path, capsys):
    """One with other GPUs, where the run lay in another folder."""
    run("train", *TINY, "--out", tmp_path / "one", "--json")
    trained = json.loads(capsys.readouterr().out)["forde-pca"]
    config = tmp_path / "one" / "config.toml"
    text = config.read_text().replace('device = "auto"', 'device = "cuda:7"')
    config.write_text(text.replace('backend = "auto"', 'backend = "cuda"'))
    assert [tomllib.loads(config.read_text())[name] for name in ("device", "backend")] == ["cuda:7", "cuda"]
    moved = (tmp_path / "one").rename(tmp_path / "moved")
    assert run("evaluate", moved, "--json") == 0
    found = json.loads(capsys.readouterr().out)["forde-pca"]
    assert found == {name: trained[name] for name in found}
    assert "device: expected cpu, cuda or cuda:N that is here" in refused(
        capsys, "evaluate", moved, "--device", "cuda:9"
    )


def test_a_file_that_fails_in_its_turn_is_one_line(tmp_path, capsys):
    run("train", *TINY, "--out", tmp_path / "one")
    run("corrupt", "--data", "digits", "--test-size", "200", "--names", "fog,contrast", "--out", tmp_path / "C")
    contrast = np.load(tmp_path / "C" / "contrast.npy")
    np.save(tmp_path / "C" / "contrast.npy", contrast.astype(object), allow_pickle=True)
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        run("evaluate", tmp_path / "one", "--corrupted-dir", tmp_path / "C")
    assert stop.value.code in (1, 2)
    assert capsys.readouterr().err.count("\n") == 1


def test_what_columns_are_of_files_is_said(tmp_path, capsys):
    run("train", *TINY, "--out", tmp_path / "one")
    run("corrupt", "--data", "digits", "--test-size", "6", "--names", "fog,gaussian_blur", "--out", tmp_path / "C")
    capsys.readouterr()
    run("evaluate", tmp_path / "one", "--corrupted-dir", tmp_path / "C")
    printed = capsys.readouterr().out
    assert "c: mean over fog alone; 6 images each\n" in printed
    assert "a: mean over fog, gaussian_blur alone; 6 images each\n" in printed


def test_fewer_corruptions_or_none(tmp_path, capsys):
    run("compare", *TINY, "--methods", "de,forde-pca", "--corruptions", "none", "--out", tmp_path)
    printed = capsys.readouterr().out
    assert "NLL beside de" in printed
    assert "cA" not in printed
    assert not [group for group in json.loads((tmp_path / "de" / "metrics.json").read_text()) if "corrupted" in group]
    run("report", tmp_path)
    assert "No run was scored on corrupted images" in (tmp_path / "report" / "report.md").read_text()
    capsys.readouterr()
    run("evaluate", tmp_path / "de", "--corruptions", "fog, gaussian_blur")
    printed = capsys.readouterr().out
    assert "c: mean over fog alone\n" in printed
    assert "g: mean over gaussian_blur alone, at the severities for grey images\n" in printed
    run("evaluate", tmp_path / "de", "--corruptions", "all", "--json")
    found = json.loads(capsys.readouterr().out)["de"]
    assert list(found["corrupted"]["by_corruption"]) == ["contrast", "gaussian_noise"]  # all that this test knows
    run("corrupt", "--data", "digits", "--names", "fog,contrast", "--out", tmp_path / "C")
    capsys.readouterr()
    run("evaluate", tmp_path / "de", "--corruptions", "fog", "--corrupted-dir", tmp_path / "C", "--json")
    assert list(json.loads(capsys.readouterr().out)["de"]["corrupted"]["by_corruption"]) == ["fog"]
    said = refused(capsys, "evaluate", tmp_path / "de", "--corruptions", "snow", "--corrupted-dir", tmp_path / "C")
    assert "corruptions: expected some that the files have (fog, contrast), got snow" in said
    (tmp_path / "de" / "metrics.json").unlink()
    run("train", "--resume", "--out", tmp_path / "de", "--corruptions", "contrast", "--json")
    assert json.loads(capsys.readouterr().out)["de"]["corrupted"]["by_corruption"].keys() == {"contrast"}
    run("report", tmp_path / "de")
    assert "but of these only contrast were scored" in (tmp_path / "de" / "report" / "report.md").read_text()


def test_resume_of_a_folder_without_a_run(tmp_path, capsys):
    for command in ("train", "compare"):
        said = refused(capsys, command, "--resume", "--out", tmp_path / "typo", "--device", "cpu")
        assert f"out: expected the folder of a run that was begun, got {tmp_path / 'typo'}" in said
    assert not (tmp_path / "typo").exists()


def test_evaluate_says_what_is_in_the_folder(tmp_path, capsys):
    run("compare", *TINY, "--methods", "de,forde-pca", "--out", tmp_path)
    capsys.readouterr()
    assert "(runs in it: de, forde-pca)" in refused(capsys, "evaluate", tmp_path)
    (tmp_path / "de" / "checkpoint.safetensors").unlink()
    assert f"(go on with: forde-fast train --resume --out {tmp_path}/de)" in refused(
        capsys, "evaluate", tmp_path / "de"
    )


def test_what_was_loaded_is_said(tmp_path, capsys):
    run("train", *TINY, "--validation", "0.25", "--out", tmp_path)
    said = capsys.readouterr().err
    assert "digits: 192 training, 64 validation, 200 test samples of 8 x 8 grey, 10 classes (0, 1, " in said


def test_images_are_normalised_by_those_that_are_trained_on(tmp_path):
    own = Run(TrainConfig("digits", train_size=256, test_size=200, validation=0.25, out=str(tmp_path / "one")))
    assert (len(own.images), len(own.valid_images)) == (192, 64)
    assert own.normalisation == Normalisation.fit(own.images)
    for others in (own.test_images, own.valid_images, torch.cat([own.images, own.valid_images])):
        assert own.normalisation != Normalisation.fit(others)


@pytest.mark.parametrize(
    "arguments", [("info", "--json"), ("train", "--help"), ("corrupt", "--test-size", "5", "--out", "{}")]
)
def test_a_reader_that_has_read_enough(arguments, tmp_path):
    reads, writes = os.pipe()
    os.close(reads)
    buffered = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    for environment in (buffered, {**buffered, "PYTHONUNBUFFERED": "1"}):
        out = tempfile.mkdtemp(dir=tmp_path)
        command = [sys.executable, "-m", "forde_fast", *(text.format(out) for text in arguments)]
        done = subprocess.run(command, stdout=writes, stderr=subprocess.PIPE, env=environment, timeout=100)
        quiet = (0, 141) if "--help" in arguments else (141,)  # unbuffered, argparse passes over it by itself
        assert done.returncode in quiet
        assert done.stderr == b""
    os.close(writes)


def test_version(capsys):
    with pytest.raises(SystemExit) as stop:
        run("--version")
    assert stop.value.code == 0
    assert capsys.readouterr().out.startswith("forde-fast 0.")


def test_the_same_seed_gives_the_same_bytes(tmp_path):
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        run("train", *TINY, "--seed", seed, "--augment", "--out", tmp_path / name)
    a, b, c = ((tmp_path / name / "checkpoint.safetensors").read_bytes() for name in "abc")
    assert a == b
    assert a != c


def test_compare_sets_methods_side_by_side(tmp_path, capsys):
    assert run("compare", *TINY, "--methods", "de,forde-identity", "--out", tmp_path) == 0
    printed = capsys.readouterr().out
    for name in ("de", "forde-identity"):
        accuracy = json.loads((tmp_path / name / "metrics.json").read_text())["clean"]["accuracy"]
        assert f"{100 * accuracy:.1f}" in next(line for line in printed.splitlines() if line.strip().startswith(name))
    assert (tmp_path / "training.png").exists()


def test_names_may_have_spaces_between(tmp_path, capsys):
    given = ("--corruptions", " contrast , fog", "--ood", "noise, fashion-mini")
    run("compare", *TINY, *given, "--methods", "de, forde-pca", "--out", tmp_path)
    metrics = json.loads((tmp_path / "forde-pca" / "metrics.json").read_text())
    assert list(metrics["ood"]) == ["noise", "fashion-mini"]
    assert list(metrics["corrupted"]["by_corruption"]) == ["contrast", "fog"]
    run("corrupt", "--test-size", 5, "--names", "fog, contrast", "--out", tmp_path / "C")
    assert {path.stem for path in (tmp_path / "C").iterdir()} == {"fog", "contrast", "labels"}
    capsys.readouterr()
    said = refused(capsys, "bench", "--shapes", "4x2x3, 0x1x2")
    assert "got '0x1x2'" in said


def test_flags_stand_over_the_file(tmp_path):
    file = tmp_path / "run.toml"
    file.write_text('data = "digits"\nmembers = 2\nlr = 1\nepochs = 1\ntrain_size = 128\nmethod = "de"\n')
    run("train", file, "--members", 3, "--out", tmp_path / "out")
    kept = read(tmp_path / "out" / "config.toml")
    assert (kept["members"], kept["lr"], kept["data"]) == (3, 1.0, "digits")


def test_configuration_round_trip(tmp_path):
    for path in ('a "quoted" \\ path', "😀 \x7f\t\n", "ö 木"):
        config = TrainConfig(data="folder", data_dir=path, width=7, lr=1e-05, augment=True)
        (tmp_path / "c.toml").write_text(to_toml(config), encoding="utf-8")
        assert TrainConfig(**read(tmp_path / "c.toml")) == config
    with pytest.raises(ValueError, match=r"^data_dir: expected text in UTF-8, got 'photos\\udcff'"):
        TrainConfig(data_dir=os.fsdecode(b"photos\xff"))


def test_resnet_from_a_file(tmp_path):
    file = tmp_path / "resnet.toml"
    file.write_text('model = "resnet18"\nwidth = 4\nmembers = 2\nepochs = 1\ntrain_size = 64\nbatch_size = 32\n')
    assert run("train", file, "--data", "digits", "--out", tmp_path / "out") == 0
    assert open_run(tmp_path / "out").ensemble.member(1).head.out_features == 10


def test_verify_and_info(capsys, monkeypatch):
    monkeypatch.setattr("forde_fast.verify.SHAPES", ((3, 1, 7),))
    monkeypatch.setattr("forde_fast.verify.DTYPES", (torch.float32,))
    monkeypatch.setattr("forde_fast.verify.CASES", ("dead row",))
    monkeypatch.setattr("forde_fast.verify.LENGTHSCALES", ("identity",))
    assert run("verify", "--json") == 0
    rows = json.loads(capsys.readouterr().out)
    assert {row["backend"] for row in rows} == {"cpp", "triton", "cuda"}
    monkeypatch.setattr("forde_fast.testing.budget", lambda *a, **k: -1.0)
    assert run("verify") == 1
    assert "NO" in capsys.readouterr().out
    assert run("info", "--json") == 0
    assert "backend cpp" in json.loads(capsys.readouterr().out)


def test_info_of_what_is_not_installed(capsys, monkeypatch):
    def absent(package):
        raise importlib.metadata.PackageNotFoundError(package)

    monkeypatch.setattr(importlib.metadata, "version", absent)
    assert run("info", "--json") == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["forde_fast"] == facts["triton"] == "not installed"


BAD = [
    (["--model", "vgg"], "model: expected one of mlp, cnn, resnet18, preactresnet18, got 'vgg'"),
    (["--method", "forde_pca"], "forde-cosine, got 'forde_pca' (forde-pca?)\n"),
    (["--corruptions", "fog,frosty"], "got 'frosty' (frost?)\n"),
    (["--epoches=3", "x", "y"], "train: error: unrecognized arguments: --epoches=3 (--epochs?) y\n"),
    (["--method", "svgd"], "method: expected one of de, weight-rde"),
    (
        ["--data", "mnist"],
        "data: expected one of fashion-mini, digits, fashion-mnist, cifar10, cifar100, tiny-imagenet, svhn",
    ),
    (["--backend", "cudnn"], "backend: expected one of auto, reference, cpp, triton"),
    (["--members", "0"], "members: expected a whole number >= 1, got 0"),
    (["--corruptions", "fog,mist"], "corruptions: expected one of gaussian_noise"),
    (["--corruptions", "none,fog"], "corruptions: expected one of gaussian_noise"),
    (["--corruptions", "fog,fog"], "corruptions: expected each once, got fog,fog"),
    (["--data", "table", "--corruptions", "fog"], "corruptions: expected none for a table of features, got fog"),
    (["--epochs", "-1"], "epochs: expected a whole number >= 1"),
    (["--lr", "nan"], "lr: expected a finite number > 0"),
    (["--alpha", "1.5"], "alpha: expected a number from 0 to 1"),
    (["--lr", "fast"], "--lr: invalid float value: 'fast'"),
    (["--train-size", "1000000"], "train_size: expected <= 2000"),
    (["--train-size", "1"], "train_size: expected 2 training images or more, got 1"),
    (["--device", "mps"], "device: expected cpu, cuda or cuda:N that is here, got 'mps'\n"),
    (["--device", "meta"], "device: expected cpu, cuda or cuda:N that is here, got 'meta'\n"),
    (
        ["--device", "cuda:x"],
        "device: expected cpu, cuda or cuda:N that is here, got 'cuda:x' (Invalid device string",
    ),
    (["--data", "fashion-mnist", "--data-dir", "/nowhere"], "no such"),
    (["missing.toml"], "config: expected a TOML file, got missing.toml"),
]


@pytest.mark.parametrize(("arguments", "message"), BAD, ids=[" ".join(a) for a, _ in BAD])
def test_bad_input_is_one_line_and_status_2(arguments, message, tmp_path, capsys):
    assert message in refused(capsys, "train", *arguments, "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_place_where_nothing_can_be_written(tmp_path, capsys):
    file = tmp_path / "file"
    file.write_text("kept")
    for command in ("train", "compare", ("reproduce", "small"), ("experiment", "basis"), "corrupt", "bench"):
        for place in (file, file / "below"):
            arguments = [command] if isinstance(command, str) else command
            assert "out: expected a folder" in refused(capsys, *arguments, "--out", place)
    assert "out: expected a folder, got an empty name" in refused(capsys, "train", "--out", "")
    assert file.read_text() == "kept"


def test_other_commands_check_their_settings_first(tmp_path, capsys):
    for arguments, message in (
        (("compare", "--methods", "de,de"), "methods: expected each method once"),
        (("reproduce", "small", "--device", "tpu9"), "device: expected cpu, cuda or cuda:N that is here"),
        (("experiment", "basis", "--members", 0), "members: expected a whole number >= 1, got 0"),
        (("experiment", "basis", "--seeds", 0), "seeds: expected a whole number >= 1, got 0"),
        (("corrupt", "--test-size", 1001), "test_size: expected <= 1000, got 1001"),
        (("corrupt", "--data", "mnist"), "data: expected one of fashion-mini"),
        (("corrupt", "--names", "mist"), "names: expected one of gaussian_noise"),
    ):
        assert message in refused(capsys, *arguments, "--out", tmp_path / "out")
        assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("name", "value"), [("members", 2.0), ("lr", "0.1"), ("seed", True), ("data", None)])
def test_a_setting_of_another_type_is_named(name, value):
    with pytest.raises(TypeError, match=f"{name}: expected (int|float|str), got"):
        TrainConfig(**{name: value})


def test_bad_files(tmp_path, capsys):
    for text, message in (
        ("colour = 3", "expected one of data, data_dir"),
        ("members = 'two'", "members: expected int"),
        ("members = true", "members: expected int"),
        ("= 3", "config: expected TOML"),
    ):
        (tmp_path / "bad.toml").write_text(text)
        assert message in refused(capsys, "train", tmp_path / "bad.toml", "--out", tmp_path / "out")
    assert "run: expected the folder of a run" in refused(capsys, "evaluate", tmp_path / "nothing")


def test_a_run_is_never_overwritten(tmp_path, capsys):
    run("train", *TINY, "--method", "de", "--out", tmp_path)
    kept = (tmp_path / "checkpoint.safetensors").read_bytes()
    capsys.readouterr()
    assert "out: expected a folder without a run" in refused(capsys, "train", *TINY, "--out", tmp_path)
    assert (tmp_path / "checkpoint.safetensors").read_bytes() == kept


def test_damaged_checkpoints_are_named(tmp_path, capsys):
    run("train", *TINY, "--method", "de", "--out", tmp_path)
    capsys.readouterr()
    checkpoint = tmp_path / "checkpoint.safetensors"
    whole = checkpoint.read_bytes()
    checkpoint.write_bytes(whole[: len(whole) // 2])
    assert "expected a checkpoint in safetensors" in refused(capsys, "evaluate", tmp_path)
    checkpoint.unlink()
    assert "expected a checkpoint file" in refused(capsys, "evaluate", tmp_path)
    (tmp_path / "config.toml").write_text((tmp_path / "config.toml").read_text().replace("width = 16", "width = 17"))
    checkpoint.write_bytes(whole)
    assert "expected the ensemble's members.0" in refused(capsys, "evaluate", tmp_path)


def test_a_failed_write_leaves_what_was_there(tmp_path, monkeypatch):
    config = TrainConfig(data="digits", members=2, epochs=1, train_size=128, method="de", out=str(tmp_path / "out"))
    run_object = Run(config)
    monkeypatch.setattr(plots, "training", lambda *a: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError, match="No space left"):
        run_object.train()
    assert open_run(tmp_path / "out").predict(run_object.test_images[:3]).shape == (2, 3, 10)
    assert torch.isfinite(run_object.ensemble.flat).all()
