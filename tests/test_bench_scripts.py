"""Scripts of bench/: the table of cheaper repulsion, and what stands in for the published program's surroundings."""

import ctypes
import importlib
import os
import shutil
from pathlib import Path

import pytest

BENCH = Path(__file__).parents[1] / "bench"


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCH))
    return importlib.import_module


def test_differences_are_paired_by_seed(script, tmp_path):
    lazy = script("lazy")
    rows = [
        {"setting": name, "seed": seed, "test_size": 7}
        | {f"{group}_{metric}": seed + gain * (1 + seed) for group in lazy.GROUPS for metric in lazy.METRICS}
        for name, gain in (("every 4th step", 0.5), ("exact", 0.0))
        for seed in (2, 0, 1)
    ]
    lazy.append("lazy", rows, tmp_path)
    steps = [{"case": "mlp", "setting": name, "over_exact": 1, "over_de": 2} for name in lazy.SETTINGS]
    lazy.append("lazy_step", steps, tmp_path)
    text = lazy.table(tmp_path)
    # differences 0.5, 1, 1.5: deviation 0.5, over the root of 3 seeds
    assert "| clean | every 4th step | 2.0000 | +1.0000 ± 0.2887 |" in text
    assert "| clean | exact | 1.0000 |  |" in text


def test_settings_are_filled_in_by_name(script):
    experiment = script("official_jax").Experiment("name")

    @experiment.config
    def settings():
        batch = 16
        double = 2 * batch  # noqa: F841 (settings are local variables)

    @experiment.capture
    def use(first, batch, double, *, last):
        return first, batch, double, last

    assert use(1, double=5, last=4) == (1, 16, 5, 4)


@pytest.mark.parametrize("lacking", ["models/resnet.py", "train_forde.py"])
def test_what_is_no_checkout_is_one_line(script, tmp_path, monkeypatch, capsys, lacking):
    official = script("official_jax")
    (tmp_path / "models").mkdir()
    for name in set(official.FILES) - {lacking}:
        (tmp_path / name).touch()
    monkeypatch.setattr("sys.argv", ["official_jax.py", "--checkout", str(tmp_path)])
    with pytest.raises(SystemExit, match="2"):
        official.main()
    assert f"checkout: expected one of AaltoPML/FoRDE, got {tmp_path}, without {lacking}" in capsys.readouterr().err


def test_what_stands_side_by_side_is_of_one_run(script):
    def rows(commit, floor_ms, **providers):
        case = {"M": "10", "B": "128", "D": "3072", "lengthscale": "identity", "device": "cpu", "dtype": "float32"}
        shared = case | {"cache": "", "cpu": "one", "commit": commit, "floor_ms": floor_ms}
        return [shared | {"provider": name, "ms": ms} for name, ms in providers.items()]

    report = script("report")
    runs = rows("a", "1.0", reference="9", cpp="2") + rows("a", "1.5", compiled="5", cpp="3")
    ((case, found),) = report.newest(runs, "cpu", "one").items()
    assert case == (10, 128, 3072, "identity")
    assert {name: row["ms"] for name, row in found.items()} == {"compiled": "5", "cpp": "3"}


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")
def test_kernels_of_a_tree_are_built_once(script, tmp_path, capsys, monkeypatch):
    """By themselves, with a function that ctypes finds; what takes a GPU says so before anything is built."""
    low_rank = script("low_rank")
    monkeypatch.setattr(low_rank.torch.cuda, "is_available", lambda: False)
    for arguments, message in (([str(tmp_path)], "TREE: expected a folder"), ([str(BENCH.parent)], "needs a CUDA")):
        with pytest.raises(SystemExit):
            low_rank.main(arguments)
        assert message in capsys.readouterr().err
    shutil.copytree(BENCH.parent / "csrc", tmp_path / "csrc")
    low_rank.main(["--build", str(tmp_path)])
    assert ctypes.CDLL(str(tmp_path / "low_rank.so")).low_rank
    os.utime(tmp_path / "low_rank.so", (2e9, 2e9))
    low_rank.main(["--build", str(tmp_path)])
    assert (tmp_path / "low_rank.so").stat().st_mtime == 2e9
