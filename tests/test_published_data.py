"""TinyImageNet, SVHN and unknown images, on small trees of the real layout."""

import numpy as np
import pytest
import scipy.io
import torch
from PIL import Image

from forde_fast import cli
from forde_fast.data import load, load_unknown

RANDOM = np.random.default_rng(11)


def write_jpeg(path, grey=False):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = RANDOM.integers(0, 256, (64, 64) if grey else (64, 64, 3), np.uint8)
    Image.fromarray(pixels).save(path, "JPEG")
    decoded = np.asarray(Image.open(path))
    return np.stack([decoded] * 3, -1) if grey else decoded


@pytest.fixture
def tiny(tmp_path):
    """tiny-imagenet-200 of three classes, with what was written: {file name: pixels}."""
    folder, wnids, pixels = tmp_path / "tiny-imagenet-200", ("n02", "n01", "n03"), {}
    for wnid in wnids:
        for i in range(3):
            name = f"{wnid}_{i}.JPEG"
            pixels[name] = write_jpeg(folder / "train" / wnid / "images" / name, grey=i == 2)
        (folder / "train" / wnid / f"{wnid}_boxes.txt").write_text("n02_0.JPEG\t0\t0\t62\t62\n")
    for i in range(4):
        pixels[f"val_{i}.JPEG"] = write_jpeg(folder / "val" / "images" / f"val_{i}.JPEG")
    lines = [f"val_{i}.JPEG\t{wnids[i % 3]}\t0\t32\t44\t62\n" for i in (3, 0, 1, 2)]
    (folder / "val" / "val_annotations.txt").write_text("".join(lines))
    (folder / "wnids.txt").write_text("\n".join(wnids))
    (folder / "words.txt").write_text("n01\tgoldfish, Carassius auratus\nn02\tcrane\nn09\tcrane\n")
    return folder, pixels


def test_tiny_imagenet(tiny):
    folder, pixels = tiny
    for place in (folder, folder.parent):
        data = load("tiny-imagenet", place)
        assert data.classes == ("n02 crane", "n01 goldfish", "n03")
        assert data.train_images.shape == (9, 64, 64, 3)
        assert data.train_labels.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]
        np.testing.assert_array_equal(data.train_images[5].numpy(), pixels["n01_2.JPEG"])
        assert data.test_labels.tolist() == [0, 0, 1, 2]
        np.testing.assert_array_equal(data.test_images[0].numpy(), pixels["val_3.JPEG"])
        assert data.normalisation.mean[0] * 255 == pytest.approx(122.4786)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / "wnids.txt").unlink(), r"wnids\.txt: expected a file that is there"),
        (
            lambda f: (f / "wnids.txt").write_text("n01"),
            r"wnids\.txt: expected 2 wnids or more, each once",
        ),
        (lambda f: (f / "wnids.txt").write_bytes(b"\xff\xfe\x00"), r"wnids\.txt: expected text, got other bytes"),
        (lambda f: (f / "wnids.txt").write_text("n01\nn07"), r"n07/images: expected a folder that is there"),
        (lambda f: (f / "wnids.txt").write_text("n01\n../val"), r"wnids\.txt: expected 2 wnids"),
        (
            lambda f: (f / "val" / "val_annotations.txt").write_text("../../secret.JPEG\tn01\n"),
            r"val_annotations\.txt, line 1: expected a file name and a wnid",
        ),
        (
            lambda f: (f / "val" / "val_annotations.txt").write_text("val_0.JPEG n01\n"),
            r"line 1: expected a file name and a wnid of wnids\.txt, got 'val_0\.JPEG n01'",
        ),
        (lambda f: (f / "val" / "images" / "val_1.JPEG").unlink(), r"val_1\.JPEG: expected a whole image file"),
        (
            lambda f: Image.new("RGB", (65, 64)).save(f / "train" / "n02" / "images" / "n02_0.JPEG"),
            r"n02_0\.JPEG: expected \(64, 64\) pixels",
        ),
    ],
)
def test_bad_tiny_imagenet_is_named(tiny, damage, message):
    damage(tiny[0])
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        load("tiny-imagenet", tiny[0])


@pytest.fixture
def svhn(tmp_path):
    for part, count in (("train", 12), ("test", 7)):
        images = RANDOM.integers(0, 256, (32, 32, 3, count), np.uint8)
        labels = (1 + np.arange(count) % 10).astype(np.uint8)[:, None]
        scipy.io.savemat(tmp_path / f"{part}_32x32.mat", {"X": images, "y": labels}, do_compression=True)
    return tmp_path


def test_svhn(svhn):
    data, stored = load("svhn", svhn), scipy.io.loadmat(svhn / "train_32x32.mat")
    assert data.train_images.shape == (12, 32, 32, 3)
    np.testing.assert_array_equal(data.train_images[5].numpy(), stored["X"][..., 5])
    assert data.train_labels.tolist() == [1, 2, 3, 4, 5, 6, 7, 8, 9, 0, 1, 2]
    assert len(data.test_labels) == 7


@pytest.mark.parametrize(
    "content",
    [
        {"X": np.zeros((32, 32, 3, 2)), "y": np.ones((2, 1))},
        {"X": np.zeros((32, 32, 3, 2), np.uint8), "y": np.ones((3, 1))},
        {"X": np.zeros((32, 32, 3, 2), np.uint8), "y": np.array([[1], [11]])},
        {"X": np.zeros((32, 32, 3, 2), np.uint8), "y": np.array([[1], [np.nan]])},
        {"X": np.array([{"a": 1}], object), "y": np.ones((2, 1))},
        {"y": np.ones((2, 1))},
        b"",
        b"MATLAB 7.3 MAT-file" + bytes(500),
        "cut",
    ],
)
def test_bad_svhn_is_one_line(svhn, content):
    path = svhn / "test_32x32.mat"
    if content == "cut":
        path.write_bytes(path.read_bytes()[:-200])
    elif isinstance(content, bytes):
        path.write_bytes(content)
    else:
        scipy.io.savemat(path, content)
    with pytest.raises(ValueError, match=r"^\S*test_32x32\.mat: expected .*, got .*$"):
        load("svhn", svhn)


def test_unknown_images_get_the_shape_asked_for(svhn):
    stored = scipy.io.loadmat(svhn / "test_32x32.mat")["X"].transpose(3, 0, 1, 2)
    np.testing.assert_array_equal(load_unknown("svhn", (32, 32, 3), svhn), stored)
    (svhn / "train_32x32.mat").unlink()  # the test file is enough
    grey = load_unknown("svhn", (32, 32), svhn, count=3)
    luminance = stored[:3] @ (0.299, 0.587, 0.114)
    assert np.abs(grey - luminance).max() <= 0.5 + 1e-9
    digits = load_unknown("digits", (28, 28), count=5)
    assert digits.shape == (5, 28, 28)
    means = load("digits").test_images[:5].double().mean((1, 2))
    torch.testing.assert_close(torch.from_numpy(digits).double().mean((1, 2)), means, atol=8, rtol=0)
    assert load_unknown("fashion-mini", (28, 28, 1), count=2).shape == (2, 28, 28, 1)
    assert load_unknown("digits", (9, 12, 3), count=2).shape == (2, 9, 12, 3)


def test_noise_is_even_and_seeded():
    noise = load_unknown("noise", (16, 16, 3), count=100)
    np.testing.assert_array_equal(noise, load_unknown("noise", (16, 16, 3), count=100))
    counts = np.bincount(noise.ravel(), minlength=256)
    assert counts.min() > 0.7 * noise.size / 256
    with pytest.raises(ValueError, match="ood: expected one of noise, fashion-mini"):
        load_unknown("table", (8, 8))


def test_a_run_says_in_one_line_what_is_wrong_with_unknown_images(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("FORDE_FAST_CACHE", str(tmp_path / "cache"))
    for arguments, message in (
        (("--ood", "nothing"), "ood: expected one of noise"),
        (("--ood", "noise,svhn", "--ood-dir", str(tmp_path)), "test_32x32.mat: expected a file that is there"),
        (
            ("--ood", "svhn"),
            "svhn/test_32x32.mat: expected a file that is there, got none; --ood-dir names the place",
        ),
        (("--ood", "folder", "--ood-dir", "/no"), "ood_dir: expected a folder of class folders, got /no; --ood-dir"),
        (("--ood", "tiny-imagenet"), "ood_dir: expected the folder tiny-imagenet-200, got"),
        (("--ood", "npz"), "ood_dir: expected the place of the images, for ood = npz, got none"),
    ):
        with pytest.raises(SystemExit) as stop:
            cli.main(["train", "--data", "digits", "--out", str(tmp_path / "out"), *arguments])
        assert stop.value.code == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
