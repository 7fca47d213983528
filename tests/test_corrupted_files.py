"""Corrupted copies as files: arrays in a folder or a .tar, class folders of images, and writing them."""

import io
import json
import subprocess
import sys
import tarfile

import numpy as np
import pytest
from PIL import Image

from forde_fast import cli
from forde_fast.data import CORRUPTIONS, CorruptedFiles, corrupt, corrupted, load, open_corrupted, write_corrupted

RANDOM = np.random.default_rng(7)
CLASSES = ("n01 cat, feline", "n02 dog", "n03 dog")


@pytest.fixture
def arrays(tmp_path):
    folder = tmp_path / "CIFAR-10-C"
    folder.mkdir()
    for name in ("fog", "spatter"):
        np.save(folder / f"{name}.npy", RANDOM.integers(0, 256, (35, 6, 5, 3), np.uint8))
    np.save(folder / "labels.npy", np.tile(np.arange(7) % 3, 5).astype(np.uint8))
    return folder


def tar_of(folder, mode="w"):
    path = folder.with_suffix(".tar")
    with tarfile.open(path, mode) as tar:
        tar.add(folder, folder.name)
    return path


@pytest.mark.parametrize("slice_bytes", [1, 200, 1 << 20])
def test_folder_and_tar_give_the_same_slices(arrays, monkeypatch, slice_bytes):
    monkeypatch.setattr(corrupted, "SLICE_BYTES", slice_bytes)
    fog, labels = np.load(arrays / "fog.npy"), np.load(arrays / "labels.npy")
    for place in (arrays, tar_of(arrays)):
        files = open_corrupted(place, (6, 5, 3), CLASSES)
        assert files.names == ("fog", "spatter")
        parts = [part for part in files if part[0] == "fog"]
        np.testing.assert_array_equal(np.concatenate([images for _, _, images, _ in parts]), fog)
        np.testing.assert_array_equal(np.concatenate([own for *_, own in parts]), labels)
        assert max(len(own) for *_, own in parts) == min(7, max(1, slice_bytes // 90))
        severities = [severity for _, severity, _, own in parts for _ in own]
        assert severities == [1 + i // 7 for i in range(35)]
    assert [path.name for path in arrays.parent.iterdir() if path.is_dir()] == [arrays.name]  # nothing was unpacked


@pytest.mark.parametrize("bad", ["compressed", "cut", "outside", "absolute", "link", "twice", "text"])
def test_bad_tars_are_refused(arrays, tmp_path, bad):
    path = tar_of(arrays, "w:gz" if bad == "compressed" else "w")
    content = (arrays / "fog.npy").read_bytes()
    more = {
        "outside": ("CIFAR-10-C/../../fog.npy", tarfile.REGTYPE),
        "absolute": ("/fog.npy", tarfile.REGTYPE),
        "twice": ("CIFAR-10-C/more/fog.npy", tarfile.REGTYPE),
        "link": ("CIFAR-10-C/snow.npy", tarfile.SYMTYPE),
    }
    if bad in more:
        with tarfile.open(path, "a") as tar:
            info = tarfile.TarInfo(more[bad][0])
            info.type, info.linkname = more[bad][1], "/etc/passwd" if bad == "link" else ""
            info.size = 0 if bad == "link" else len(content)
            tar.addfile(info, io.BytesIO(content))
    elif bad == "cut":
        path.write_bytes(path.read_bytes()[:3000])
    elif bad == "text":
        path.write_text("not a tar")
    with pytest.raises(ValueError, match=r"CIFAR-10-C\.tar.*: expected .*, got "):
        CorruptedFiles(path, (6, 5, 3), 3)


def header(text):
    return b"\x93NUMPY\x01\x00" + (len(text) + 1).to_bytes(2, "little") + text.encode() + b"\n"


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"GIF89a",
        header("{'descr': '|u1', 'fortran_order': True, 'shape': (35, 6, 5, 3)}") + bytes(3150),
        header("{'descr': '|u1', 'fortran_order': False, 'shape': (35, 6, 5, 3)}") + bytes(3149),
        header("{'descr': '|u1', 'fortran_order': False, 'shape': (-35, -6, 5, 3)}") + bytes(3150),
        header("{'descr': '|O', 'fortran_order': False, 'shape': (35,)}") + bytes(280),
        header("{'descr': __import__('os'), 'fortran_order': False, 'shape': (35,)}"),
        header("((((((" * 500),
    ],
)
def test_damaged_arrays_are_refused_in_one_line(arrays, content):
    (arrays / "fog.npy").write_bytes(content)
    with pytest.raises(
        ValueError, match=r"^\S*fog\.npy: expected a whole \.npy file of numbers, got another \(.*\)$"
    ):
        CorruptedFiles(arrays, (6, 5, 3), 3)


MEASURE = """
import resource, sys
import numpy as np
from forde_fast.data import CorruptedFiles
from forde_fast.evaluation import score_corrupted

def member_probs_of(images):
    bright = images.mean((1, 2, 3), dtype=np.float32)[None, :, None] / 255
    return np.concatenate([bright, 1 - bright], 2)

files = CorruptedFiles(sys.argv[1], (32, 32, 3), 2)
warm = next(iter(files))
member_probs_of(warm[2])
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
score_corrupted(member_probs_of, files)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def test_memory_does_not_grow_with_the_files(tmp_path):
    """Two corruptions of 120 MiB each, sparse files, take no more than a few slices of 4 MiB."""
    count = 8000
    for name in ("fog", "snow"):
        with (tmp_path / f"{name}.npy").open("wb") as file:
            shape = (5 * count, 32, 32, 3)
            np.lib.format.write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": shape})
            file.truncate(file.tell() + 5 * count * 3072)
    np.save(tmp_path / "labels.npy", np.zeros(5 * count, np.uint8))
    run = subprocess.run(
        [sys.executable, "-c", MEASURE, str(tmp_path)], capture_output=True, text=True, check=True, timeout=120
    )
    assert int(run.stdout) < 40 << 10  # KiB


# ---------------------------------------------------------------- Tiny-ImageNet-C


def write_image(path, size=(8, 8), grey=False):
    path.parent.mkdir(parents=True, exist_ok=True)
    shape = size if grey else (*size, 3)
    pixels = RANDOM.integers(0, 256, shape, np.uint8)
    Image.fromarray(pixels).save(path, "PNG")  # lossless, whatever it is called
    return pixels


def write_tiny_c(folder, corruptions, extra_class=False):
    return {
        (name, severity, wnid, number): write_image(
            folder / name / str(severity) / wnid / f"test_{number}.JPEG", grey=number == 1
        )
        for name in corruptions
        for severity in (1, 2, 3, 4, 5)
        for wnid in ("n01", "n02", "n03", *(("n99",) if extra_class else ()))
        for number in range(2)
    }


@pytest.mark.parametrize("layout", ["one folder", "two archives"])
def test_tiny_imagenet_c(tmp_path, monkeypatch, layout):
    monkeypatch.setattr(corrupted, "SLICE_BYTES", 4 * 192)
    if layout == "one folder":
        pixels = write_tiny_c(tmp_path, ("frost", "saturate"), extra_class=True)
    else:
        pixels = write_tiny_c(tmp_path / "Tiny-ImageNet-C", ("frost",), extra_class=True)
        pixels |= write_tiny_c(tmp_path / "Tiny-ImageNet-C-extra", ("saturate",))
    files = open_corrupted(tmp_path, (8, 8, 3), CLASSES)
    assert files.names == ("frost", "saturate")
    for wanted in files.names:
        for severity in (1, 5):
            parts = [part for part in files if part[:2] == (wanted, severity)]
            assert [len(labels) for *_, labels in parts] == [4, 2]
            assert np.concatenate([labels for *_, labels in parts]).tolist() == [0, 0, 1, 1, 2, 2]
            got = np.concatenate([images for _, _, images, _ in parts])
            np.testing.assert_array_equal(got[2], pixels[wanted, severity, "n02", 0])
            np.testing.assert_array_equal(got[5], np.stack([pixels[wanted, severity, "n03", 1]] * 3, -1))


def test_bad_class_folders_are_named(tmp_path):
    write_tiny_c(tmp_path, ("fog",))
    with pytest.raises(FileNotFoundError, match=r"fog/1/n04: expected a folder that is there"):
        open_corrupted(tmp_path, (8, 8, 3), (*CLASSES, "n04 hen"))
    with pytest.raises(ValueError, match=r"test_0\.JPEG: expected an image of shape \[8, 8\], got \[8, 8, 3\]"):
        open_corrupted(tmp_path, (8, 8), CLASSES)
    with pytest.raises(ValueError, match=r"test_0\.JPEG: expected \(9, 8\) pixels"):
        open_corrupted(tmp_path, (9, 8, 3), CLASSES)
    (tmp_path / "fog" / "3" / "n02" / "test_1.JPEG").write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"n02/test_1\.JPEG: expected a whole image file"):
        list(open_corrupted(tmp_path, (8, 8, 3), CLASSES))
    with pytest.raises(FileNotFoundError, match=r"corrupted_dir: expected a folder of \.npy files, or their \.tar"):
        open_corrupted(tmp_path / "none", (8, 8, 3), CLASSES)


# ---------------------------------------------------------------- writing


def test_what_is_written_is_what_corrupt_makes(tmp_path):
    digits = load("digits")
    images, labels = digits.test_images[:9].numpy(), digits.test_labels[:9].numpy()
    write_corrupted(tmp_path / "C", images, labels, ("fog", "pixelate"), seed=3)
    stored = np.load(tmp_path / "C" / "fog.npy")
    expected = np.concatenate([corrupt(images, "fog", severity, seed=3) for severity in (1, 2, 3, 4, 5)])
    np.testing.assert_array_equal(stored, expected)
    again = tmp_path / "again"
    write_corrupted(again, images, labels, ("fog",), seed=3)
    assert (again / "fog.npy").read_bytes() == (tmp_path / "C" / "fog.npy").read_bytes()
    write_corrupted(again, images, labels, ("snow",))  # more of them later
    assert CorruptedFiles(again, (8, 8), 10).names == ("snow", "fog")
    for name, other, message in (("fog", labels, "without it"), ("frost", labels[::-1], "the same labels")):
        with pytest.raises(FileExistsError, match=message):
            write_corrupted(again, images, other, (name,))
    assert sorted(path.name for path in again.iterdir()) == ["fog.npy", "labels.npy", "snow.npy"]


def test_command_writes_what_evaluate_reads(tmp_path, capsys):
    out = tmp_path / "digits-C"
    assert cli.main(["corrupt", "--data", "digits", "--test-size", "20", "--out", str(out)]) == 0
    assert f"--corrupted-dir {out}" in capsys.readouterr().out
    assert {path.stem for path in out.iterdir()} == {*CORRUPTIONS, "labels"}
    train = "train --data digits --members 2 --epochs 1 --width 8 --test-size 20 --method de --ood noise --out"
    assert cli.main([*train.split(), str(tmp_path / "run")]) == 0
    made_here = json.loads((tmp_path / "run" / "metrics.json").read_text())
    capsys.readouterr()
    arguments = ("--corrupted-dir", str(out), "--ood", "noise,fashion-mini", "--json")
    assert cli.main(["evaluate", str(tmp_path / "run"), *arguments]) == 0
    from_files = json.loads(capsys.readouterr().out)["de"]
    for group in ("corrupted", "corrupted_all", "corrupted_extra"):
        assert from_files[group]["nll"] == pytest.approx(made_here[group]["nll"], rel=1e-9)
    assert from_files["ood"]["noise"] == made_here["ood"]["noise"]
    assert 0 <= from_files["ood"]["fashion-mini"]["total"]["auroc"] <= 1

    for arguments, message in (
        (["--data", "digits"], "out: expected a folder without it"),
        (["--data", "digits", "--names", "fog,rust"], "names: expected one of"),
        (["--preset", "hard"], "preset: expected one of cifar, grey"),
        (["--data", "nothing"], "expected one of"),
    ):
        with pytest.raises(SystemExit) as stop:
            cli.main(["corrupt", "--out", str(out), *arguments])
        assert stop.value.code == 2
        assert message in capsys.readouterr().err
