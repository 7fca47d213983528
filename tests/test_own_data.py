"""A user's own data, in small files of the real layout; and one clear line for what is bad."""

import json
import pickle
import struct

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from forde_fast import cli
from forde_fast.config import TrainConfig, read
from forde_fast.data import load, stratified
from forde_fast.data.own import read_image

RANDOM = np.random.default_rng(0)


class Evil:
    def __reduce__(self):
        return (open, ("evil", "w"))


# ---------------------------------------------------------------- class folders


def image(path, color=True, size=(10, 8), mode=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    shape = (size[1], size[0], 3) if color else (size[1], size[0])
    pixels = Image.fromarray(RANDOM.integers(0, 256, shape, np.uint8))
    (pixels.convert(mode) if mode else pixels).save(path)


def folder_of(root, color=True, count=5):
    for name in ("cat", "dog"):
        for i in range(count):
            image(root / name / f"{i}.png", color)
    return root


def test_class_folders_with_and_without_a_test_part(tmp_path):
    folder_of(tmp_path / "one")
    for name in (".DS_Store", "Thumbs.db", "desktop.ini"):
        (tmp_path / "one" / "cat" / name).write_bytes(b"x")
    one = load("folder", tmp_path / "one")
    assert one.classes == ("cat", "dog")
    assert (len(one.train_labels), len(one.test_labels)) == (8, 2)
    assert sorted(one.test_labels.tolist()) == [0, 1]
    assert one.train_images.shape[1:] == (8, 10, 3)
    both = np.concatenate([one.train_images.numpy(), one.test_images.numpy()])
    stored = [np.asarray(Image.open(path)) for path in (tmp_path / "one").rglob("*.png")]
    assert sorted(map(bytes, both)) == sorted(map(bytes, stored))
    folder_of(tmp_path / "two" / "train", count=3)
    folder_of(tmp_path / "two" / "test", count=2)
    two = load("folder", tmp_path / "two")
    assert (len(two.train_labels), len(two.test_labels)) == (6, 4)
    folder_of(tmp_path / "three" / "train")
    three = load("folder", tmp_path / "three")
    assert (three.classes, len(three.train_labels), sorted(three.test_labels.tolist())) == (one.classes, 8, [0, 1])
    dog = np.asarray(Image.open(tmp_path / "two" / "train" / "dog" / "1.png"))
    (place,) = [i for i, x in enumerate(two.train_images.numpy()) if np.array_equal(x, dog)]
    assert two.train_labels[place] == 1


def test_grey_images_stay_grey_unless_there_are_others(tmp_path):
    folder_of(tmp_path, color=False)
    assert load("folder", tmp_path).train_images.ndim == 3
    image(tmp_path / "cat" / "colour.png", mode="P")
    assert load("folder", tmp_path).train_images.shape[3] == 3


@pytest.mark.parametrize("form", ["png", "jpg", "tif"])
@pytest.mark.parametrize("turn", range(1, 9))
def test_photos_are_turned_as_they_are_shown(turn, form, tmp_path):
    folder_of(tmp_path)
    stored = Image.fromarray(RANDOM.integers(0, 256, (10, 8, 3) if turn >= 5 else (8, 10, 3), np.uint8))
    stored.save(tmp_path / "dog" / f"photo.{form}", exif=orientation(turn))
    with Image.open(tmp_path / "dog" / f"photo.{form}") as photo:
        shown = np.asarray(ImageOps.exif_transpose(photo))
    data = load("folder", tmp_path)
    assert bytes(shown) in map(bytes, np.concatenate([data.train_images.numpy(), data.test_images.numpy()]))


def orientation(turn):
    exif = Image.Exif()
    exif[0x0112] = turn
    return exif


def test_a_photo_whose_exif_cannot_be_read_is_shown_as_it_lies(tmp_path):
    Image.fromarray(RANDOM.integers(0, 256, (8, 10, 3), np.uint8)).save(tmp_path / "a.jpg", exif=b"Exif\0\0MM?")
    assert np.array_equal(read_image(tmp_path / "a.jpg", (8, 10)), np.asarray(Image.open(tmp_path / "a.jpg")))


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "RGB", "L", "1"])
def test_what_is_transparent_is_put_on_white(mode, tmp_path):
    black, name = Image.new("RGB", (3, 1)).convert(mode), tmp_path / "a.png"
    if mode in ("RGBA", "LA"):  # transparent, half, opaque
        black.putalpha(Image.fromarray(np.array([[0, 128, 255]], np.uint8)))
        black.save(name)
    else:  # one colour stands for what is transparent
        black.putpixel((2, 0), 255 if mode in ("L", "1") else 1 if mode == "P" else (255, 0, 0))
        black.save(name, transparency=(0, 0, 0) if mode == "RGB" else 0)
    pixels = read_image(name, (1, 3))
    assert pixels.ndim == (2 if mode in ("LA", "L", "1") else 3)
    assert (pixels[0, 0] == 255).all()
    if mode in ("RGBA", "LA"):
        assert (pixels[0, 1] == 127).all()
        assert (pixels[0, 2] == 0).all()
    else:
        opaque = Image.open(name).convert("RGB" if pixels.ndim == 3 else "L")
        assert np.array_equal(pixels[0, 2], np.asarray(opaque)[0, 2])


def test_parts_of_two_sizes_become_one(tmp_path):
    folder_of(tmp_path / "train")
    for name in ("cat", "dog"):
        image(tmp_path / "test" / name / "0.png", size=(9, 9))
    with pytest.raises(
        ValueError, match=r"test: expected images of \[8, 10\] .*, got \[9, 9\]; --image-size N makes"
    ):
        load("folder", tmp_path)
    assert load("folder", tmp_path, image_size=9).test_images.shape == (2, 9, 9, 3)


def test_photos_of_several_sizes_become_one(tmp_path):
    for part in ("train", "test"):
        folder_of(tmp_path / part, color=False, count=2)
    image(tmp_path / "train" / "dog" / "wide.png", size=(64, 16))
    with pytest.raises(ValueError, match=r"expected \(8, 10\) pixels .*, got \(16, 64\); --image-size N makes"):
        load("folder", tmp_path)
    for size in (4, 16):  # smaller than all, larger than some
        data = load("folder", tmp_path, image_size=size)
        assert data.train_images.shape == (5, size, size, 3)
        assert data.test_images.shape == (4, size, size, 3)
    stored = np.asarray(Image.open(tmp_path / "train" / "dog" / "wide.png"))
    assert bytes(stored[:, 24:40]) in map(bytes, data.train_images.numpy())  # its middle, which needs no scaling


@pytest.mark.parametrize("turn", range(1, 9))
def test_scaled_photos_are_turned_too(turn, tmp_path):
    Image.fromarray(RANDOM.integers(0, 256, (21, 34, 3), np.uint8)).save(tmp_path / "a.png", exif=orientation(turn))
    shown = ImageOps.exif_transpose(Image.open(tmp_path / "a.png"))
    side = [(length - 21) / 2 for length in shown.size]
    wanted = shown.resize((6, 6), Image.Resampling.BICUBIC, (*side, *(length + 21 for length in side)))
    assert np.array_equal(read_image(tmp_path / "a.png", None, size=6), np.asarray(wanted))


def test_a_size_is_for_class_folders_alone(tmp_path):
    for data in ("digits", "table"):
        with pytest.raises(ValueError, match=f"image_size: expected none, as .* = folder .*, got 8 for {data}"):
            TrainConfig(data=data, image_size=8)
        with pytest.raises(ValueError, match=f"image_size: expected none.*, got 8 for {data}"):
            load(data, tmp_path, image_size=8)
    with pytest.raises(ValueError, match="image_size: expected a whole number >= 1, got 0"):
        TrainConfig(data="folder", image_size=0)


def bomb(path):
    image(path)
    content = bytearray(path.read_bytes())
    content[16:24] = struct.pack(">II", 60000, 60000)  # PNG's header alone says how large it is
    import zlib

    content[29:33] = struct.pack(">I", zlib.crc32(bytes(content[12:29])))
    path.write_bytes(content)


def cut(path):
    image(path)
    path.write_bytes(path.read_bytes()[:-60])


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda d: (d / "eel").mkdir(), r"eel: expected at least one image, got an empty folder"),
        (lambda d: image(d / "dog" / "9.png", size=(8, 10)), r"9\.png: expected \(8, 10\) pixels .*, got \(10, 8\)"),
        (lambda d: (d / "dog" / "9.png").write_bytes(b"GIF89a"), r"9\.png: expected a whole image file"),
        (lambda d: (d / "dog" / "notes.txt").write_text("hello"), r"notes\.txt: expected a whole image file"),
        (lambda d: cut(d / "dog" / "9.png"), r"9\.png: expected a whole image file"),
        (lambda d: bomb(d / "cat" / "0.png"), r"0\.png: expected an image of a plausible size"),
        (lambda d: image(d / "dog" / "9.png", False, mode="I;16"), r"9\.png: expected 8 bits per channel"),
        (
            lambda d: [p.unlink() for p in d.glob("cat/[1-9].png")],
            "2 samples or more of every class, got 1 of class cat",
        ),
        (lambda d: image(d / "dog" / "old" / "9.png"), r"old: expected an image file, got a folder"),
        (
            lambda d: Image.new("RGB", (10, 8)).save(d / "dog" / "9.jpg", exif=orientation(6)),
            r"9\.jpg: expected \(8, 10\) pixels .*, got \(10, 8\)",
        ),
    ],
)
def test_bad_class_folders_are_named(spoil, message, tmp_path):
    folder_of(tmp_path)
    spoil(tmp_path)
    with pytest.raises(ValueError, match=message) as raised:
        load("folder", tmp_path)
    assert "\n" not in str(raised.value)


def test_bad_parts_of_class_folders(tmp_path):
    folder_of(tmp_path / "train")
    folder_of(tmp_path / "val")
    with pytest.raises(ValueError, match=r"expected train/ and test/, or train/ alone, got val besides"):
        load("folder", tmp_path)
    folder_of(tmp_path / "test")
    image(tmp_path / "test" / "eel" / "0.png")
    with pytest.raises(ValueError, match=r"test: expected the classes of train/, got eel besides"):
        load("folder", tmp_path)
    with pytest.raises(FileNotFoundError, match="data_dir: expected a folder of class folders"):
        load("folder", tmp_path / "nothing")
    with pytest.raises(ValueError, match="data_dir: expected the place of the data, for data = folder, got none"):
        load("folder")


# ---------------------------------------------------------------- arrays and tables


def arrays(n=20):
    return {"images": RANDOM.integers(0, 256, (n, 6, 6), np.uint8), "labels": np.arange(n) % 2}


def features(n=20):
    return {"x": RANDOM.normal(size=(n, 3)), "y": np.arange(n) % 2}


def test_arrays_in_one_file_or_a_folder(tmp_path):
    both = {f"{part}_{name}": a for part in ("train", "test") for name, a in arrays().items()}
    np.savez(tmp_path / "both.npz", **both)
    np.savez_compressed(tmp_path / "once.npz", **arrays())
    (tmp_path / "folder").mkdir()
    for name, array in features().items():
        np.save(tmp_path / "folder" / f"{name}.npy", array)
    read = load("npz", tmp_path / "both.npz")
    assert sorted(map(bytes, read.test_images.numpy())) == sorted(map(bytes, both["test_images"]))
    assert [len(load("npz", tmp_path / "once.npz").train_labels), len(read.train_labels)] == [16, 20]
    np.savez(tmp_path / "train.npz", **{f"train_{name}": a for name, a in arrays().items()})
    assert len(load("npz", tmp_path / "train.npz").test_labels) == 4
    np.savez(tmp_path / "bare.npz", **arrays(), **{f"test_{name}": a for name, a in arrays(10).items()})
    assert len(load("npz", tmp_path / "bare.npz").test_labels) == 10
    table = load("table", tmp_path / "folder")
    assert table.table
    assert table.train_images.dtype == torch.float32
    assert table.train_images.shape == (16, 3)


def test_a_csv_of_numbers_with_named_classes(tmp_path):
    path = tmp_path / "t.csv"
    lines = [f"{i},{'b' if i % 2 else 'a'},{i / 2}" for i in range(10)]
    path.write_text("size,label,weight\n" + "\n".join(lines) + "\n")
    table = load("table", path)
    assert table.classes == ("a", "b")
    x, y = table.train_images, table.train_labels
    assert torch.equal(x[:, 0] % 2, y.float())
    assert torch.equal(x[:, 1], x[:, 0] / 2)
    assert load("table", path.rename(tmp_path / "t.CSV")).classes == ("a", "b")
    path.write_text((tmp_path / "t.CSV").read_text().replace("label", "colour"))
    with pytest.raises(ValueError, match=r"t\.csv, row 1: expected a number as 'colour', got 'a'"):
        load("table", path)  # then the last column is the label


@pytest.mark.parametrize("head", ["\ufefflabel,size", " label ,size", "Label,size", "LABEL,1"])
def test_a_label_is_found_as_spreadsheets_write_it(head, tmp_path):
    (tmp_path / "t.csv").write_text(head + "\n" + "\n".join(f"{i % 2},{i}" for i in range(10)), encoding="utf-8")
    table = load("table", tmp_path / "t.csv")
    assert torch.equal(table.train_images[:, 0] % 2, table.train_labels.float())


NAN = features()
NAN["x"][7, 2] = np.nan


@pytest.mark.parametrize(
    ("data", "content", "message"),
    [
        ("npz", {"images": arrays()["images"]}, "expected arrays train_images.*, got images$"),
        (
            "npz",
            {**arrays(), "test_images": arrays()["images"]},
            "expected arrays .*, got images, labels, test_images$",
        ),
        ("npz", {**arrays(), "images": np.zeros((20, 3))}, r"images: expected uint8 .*, got float64 \[20, 3\]"),
        ("npz", {**arrays(), "labels": np.zeros(20)}, r"labels: expected whole numbers \[20\].*, got float64"),
        ("npz", {**arrays(), "labels": np.arange(19)}, r"labels: expected whole numbers \[20\].*, got int64 \[19\]"),
        ("npz", {**arrays(), "labels": np.arange(20) % 2 - 1}, "labels: expected labels from 0, got -1"),
        (
            "npz",
            {**arrays(), "labels": np.arange(20) % 2 * 2},
            "labels: expected samples of every class, got none of class 1",
        ),
        ("npz", {**arrays(), "labels": np.array([Evil()] * 20, object)}, "expected a whole .npz file of numbers"),
        ("table", arrays(), r"images: expected floating features \[N, F\], got uint8"),
        ("table", NAN, "x: expected finite numbers of float32, got nan at row 7, column 2"),
    ],
)
def test_bad_arrays_are_named(data, content, message, tmp_path):
    np.savez(tmp_path / "bad.npz", **content)
    with pytest.raises(ValueError, match=message) as raised:
        load(data, tmp_path / "bad.npz")
    assert "\n" not in str(raised.value)


def test_damaged_and_foreign_arrays_are_named(tmp_path):
    path = tmp_path / "bad.npz"
    np.savez(path, **arrays())
    whole = path.read_bytes()
    spoilt = bytearray(whole)
    spoilt[200] ^= 255
    for content in (b"", b"GIF89a", whole[: len(whole) // 2], bytes(spoilt), pickle.dumps(Evil())):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"bad\.npz: expected a whole \.npz file of numbers, got another"):
            load("npz", path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "expected a line of names and rows of numbers, got an empty file"),
        ("1,2,a\n1,2,a\n1,2,b\n1,2,b\n", "expected a first line of names, not of numbers, got '1,2,a'"),
        ("1,,a\n1,2,a\n1,2,b\n1,2,b\n", "expected a first line of names, not of numbers, got '1,,a'"),
        ("x;y;label\n1;2;a\n", "expected comma-separated columns .*, got one column 'x;y;label'"),
        ("x\tlabel\n1\ta\n", r"expected comma-separated columns .*, got one column 'x\\tlabel'"),
        ("label,x,Label\n1,2,3\n", "expected one column label, got 2 of them"),
        ("a,label\n1,x\n2,\n", "row 2: expected a label as 'label', got an empty cell"),
        ("a,label\n1,0\n2, \n", "row 2: expected a label as 'label', got an empty cell"),
        ("a,label\n1,x\n1,x\n2,y\n", "labels: expected 2 samples or more of every class, got 1 of class y"),
        ("a,price\n1,0.5\n2,1.5\n2,3\n", "expected classes as 'price', got numbers: 3 different ones in 3 rows"),
        ("a,label\n", "expected rows of features and a label, got 0 rows"),
        ("a,label\n1,0\nnan,1\n", "row 2: expected a finite 'a' of float32, got 'nan'"),
        ("a,label\n1,0\n2\n", "row 2: expected 2 values, got 1"),
        ("a,label\nx,0\n", "row 1: expected a number as 'a', got 'x'"),
        ("a,label\n1,0\n1,0\n1,2\n1,2\n", "expected samples of every class, got none of class 1"),
        ("\xff\xfe\x00", "row|names"),
    ],
)
def test_bad_tables_are_named(text, message, tmp_path):
    (tmp_path / "t.csv").write_bytes(text.encode("latin1"))
    with pytest.raises(ValueError, match=message) as raised:
        load("table", tmp_path / "t.csv")
    assert "\n" not in str(raised.value)


# ---------------------------------------------------------------- parts


@pytest.mark.parametrize("share", [0.01, 0.2, 0.5, 0.9])
def test_stratified_parts(share):
    labels = np.repeat([0, 1, 2, 3], [1, 2, 50, 100])
    rest, held = stratified(labels, share, seed=3)
    assert sorted([*rest, *held]) == list(range(153))
    for label, count in ((2, 50), (3, 100)):
        assert abs((labels[held] == label).sum() - share * count) <= 0.5
    assert set(labels[rest]) == {0, 1, 2, 3}
    assert np.array_equal(held, stratified(labels, share, seed=3)[1])
    assert share == 0.9 or not np.array_equal(held, stratified(labels, share, seed=4)[1])


# ---------------------------------------------------------------- runs on them


@pytest.fixture(autouse=True)
def few_corruptions(monkeypatch):
    monkeypatch.setattr("forde_fast.run.CORRUPTIONS", ("contrast",))


def trained(tmp_path, *arguments):
    out = tmp_path / "out"
    tiny = ("--members", 2, "--epochs", 2, "--width", 8, "--batch-size", 8, "--out", out)
    assert cli.main(["train", *map(str, (*arguments, *tiny))]) == 0
    return out, json.loads((out / "metrics.json").read_text())


def test_a_run_on_images_of_ones_own(tmp_path):
    folder_of(tmp_path / "pets", count=20)
    out, metrics = trained(
        tmp_path, "--data", "folder", "--data-dir", tmp_path / "pets", "--model", "cnn", "--augment"
    )
    assert len(metrics["clean"]["members"]) == 2
    assert (out / "predictions.png").exists()


def test_a_run_on_photos_of_several_sizes(tmp_path, capsys):
    folder_of(tmp_path / "pets", count=10)
    image(tmp_path / "pets" / "dog" / "wide.png", size=(64, 16))
    given = ("--data", "folder", "--data-dir", tmp_path / "pets", "--image-size", 8, "--model", "cnn")
    out, metrics = trained(tmp_path, *given, "--ood", "folder", "--ood-dir", tmp_path / "pets")
    assert read(out / "config.toml")["image_size"] == 8
    assert "17 training, 4 test samples of 8 x 8 RGB" in capsys.readouterr().err
    assert metrics["ood"]["folder"]["total"]["auroc"] == 0.5  # the test images themselves
    assert cli.main(["evaluate", str(out), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["forde-pca"]["clean"] == metrics["clean"]
    assert cli.main(["report", str(out)]) == 0
    assert "(reliability.png)" in (out / "report" / "report.md").read_text()
    (out / "metrics.json").unlink()
    with pytest.raises(SystemExit):
        cli.main(["train", "--resume", "--out", str(out), "--image-size", "9"])
    assert "image_size: expected 8 as in" in capsys.readouterr().err
    assert cli.main(["corrupt", *map(str, given[:6]), "--names", "fog", "--out", str(tmp_path / "C")]) == 0
    assert cli.main(["evaluate", str(out), "--corrupted-dir", str(tmp_path / "C")]) == 0


def test_classes_without_images_are_said(tmp_path, capsys):
    folder_of(tmp_path / "pets" / "train")
    folder_of(tmp_path / "pets" / "test")
    image(tmp_path / "pets" / "train" / "eel" / "0.png")
    given = ("--data", "folder", "--data-dir", tmp_path / "pets", "--model", "cnn")
    trained(tmp_path / "a", *given)
    assert "3 classes (cat, dog, eel); no test images of: eel\n" in capsys.readouterr().err
    trained(tmp_path / "b", *given, "--train-size", 2, "--test-size", 1)
    said = capsys.readouterr().err
    assert said.count("; no training images of: ") == said.count("; no test images of: ") == 1


def test_a_run_on_a_table(tmp_path):
    x = RANDOM.normal(size=(60, 5)) * 40 + 1000
    np.savez(tmp_path / "t.npz", features=x, labels=(x[:, 0] > 1000).astype(int))
    _, metrics = trained(tmp_path, "--data", "table", "--data-dir", tmp_path / "t.npz", "--lr", "0.02")
    assert "corrupted" not in metrics
    assert metrics["clean"]["accuracy"] > 0.6


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data", "table", "--model", "cnn"], "model: expected mlp, the only one for features"),
        (["--data", "table", "--augment"], "augment: expected no augmentation of features"),
        (["--data", "folder"], "data_dir: expected the place of the data"),
        (["--data-dir", "photos"], "data_dir: expected none for fashion-mini, which comes with the package"),
        (["--data", "cifar10", "--data-dir", "/nowhere"], "expected a file that is there"),
        (["--corrupted-dir", "/nowhere"], "corrupted_dir: expected a folder of .npy files"),
        (["--validation", "1"], "validation: expected a share from 0 to below 1, got 1.0"),
    ],
)
def test_bad_runs_are_one_line_and_status_2(arguments, message, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["train", *arguments, "--out", str(tmp_path / "out")])
    error = capsys.readouterr().err
    assert stop.value.code == 2
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()
