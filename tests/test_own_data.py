"""CIFAR's files and a user's own data, in small files of the real layout; and one clear line for what is bad."""

import io
import json
import pickle
import struct
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image

from forde_fast import cli
from forde_fast.data import CorruptedFiles, cifar, load, stratified
from forde_fast.data.cifar import ARCHIVES, unpickle
from forde_fast.data.corruptions import EXTRA, STANDARD

RANDOM = np.random.default_rng(0)


def text2(text):
    return b"U" + bytes([len(text)]) + text.encode()  # SHORT_BINSTRING


def pickle2(stored):
    """What Python 2 wrote, protocol 2 with byte strings, as the published files are: opcode by opcode."""
    out = b"\x80\x02}("
    for key, value in stored.items():
        out += text2(key)
        if isinstance(value, np.ndarray):
            out += b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R(K\x01"
            out += b"".join(b"J" + struct.pack("<i", size) for size in value.shape) + b"\x86"
            out += b"cnumpy\ndtype\n(U\x02u1K\x00K\x01tR(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
            out += b"I00\nT" + struct.pack("<i", value.nbytes) + value.tobytes() + b"tb"
        else:
            items = (text2(item) if isinstance(item, str) else b"K" + bytes([item]) for item in value)
            out += b"](" + b"".join(items) + b"e"
    return out + b"u."


def cifar_files(name, classes):
    """{file: content} of a small set."""
    archive, files = ARCHIVES[name], {}
    for i, file in enumerate(archive.train + archive.test):
        data = np.arange(8 * 3072, dtype=np.uint32).reshape(8, 3072) % 251 + i
        files[file] = {"data": data.astype(np.uint8), archive.labels: [j % classes for j in range(8)]}
    files[archive.meta[0]] = {archive.meta[1]: [f"class{i}" for i in range(classes)]}
    return {file: pickle2(content) for file, content in files.items()}


def write_folder(files, folder):
    folder.mkdir(parents=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)


def write_tar(files, path, top=None):
    with tarfile.open(path, "w:gz") as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(name if top is None else f"{top}/{name}")
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))


@pytest.mark.parametrize("name", ARCHIVES)
def test_cifar_folder_and_archive_are_the_same_set(name, tmp_path):
    files, archive = cifar_files(name, 4), ARCHIVES[name]
    write_folder(files, tmp_path / archive.folder)
    tar = tmp_path / "store" / archive.url.rpartition("/")[2]
    tar.parent.mkdir()
    write_tar(files, tar, archive.folder)
    sets = [load(name, place) for place in (tmp_path, tmp_path / archive.folder, tar.parent, tar)]
    one = sets[0]
    assert one.train_images.shape == (8 * len(archive.train), 32, 32, 3)
    assert one.test_labels.tolist() == [0, 1, 2, 3] * 2
    assert one.train_images[0, 0, 1].tolist() == [1, 1024 % 251 + 1, 2048 % 251 + 1]  # planes of red, green, blue
    assert one.classes == ("class0", "class1", "class2", "class3")
    assert one.normalisation.mean == archive.mean
    for other in sets[1:]:
        assert torch.equal(other.train_images, one.train_images)
        assert torch.equal(other.train_labels, one.train_labels)


def test_cifar_is_fetched_into_the_cache_by_its_checksum(tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match=r"cifar-10-python\.tar\.gz: .*pass download=True \(--download\)"):
        load("cifar10", tmp_path)
    write_tar(cifar_files("cifar10", 2), tmp_path / "cifar-10-python.tar.gz", "cifar-10-batches-py")
    monkeypatch.setenv("FORDE_FAST_CACHE", str(tmp_path / "cache"))
    archive = cifar.Archive(**{**vars(ARCHIVES["cifar10"]), "url": (tmp_path / "cifar-10-python.tar.gz").as_uri()})
    monkeypatch.setitem(ARCHIVES, "cifar10", archive)
    with pytest.raises(ValueError, match=f"expected a file with md5 {archive.md5}; got "):
        load("cifar10", download=True)
    assert not list((tmp_path / "cache").iterdir())


def test_published_addresses_and_checksums():
    assert ARCHIVES["cifar10"].md5 == "c58f30108f718f92721af3b95e74349a"
    assert ARCHIVES["cifar100"].md5 == "eb9058c3a382ffc7106e4002c42a8d85"
    assert len(STANDARD) == 15
    assert len(set(STANDARD + EXTRA)) == 19


class Evil:
    def __reduce__(self):
        return (open, ("evil", "w"))


def test_pickles_run_no_code(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for protocol in range(6):
        with pytest.raises(ValueError, match=r"^b: expected a whole pickle of arrays that runs no code, got .*open"):
            unpickle("b", pickle.dumps({"data": Evil()}, protocol))
    for code in (b"cos\nsystem\n(S'touch evil'\ntR.", b"cnumpy\nload\n(S'evil'\ntR.", b"cbuiltins\neval\n(S'1'\ntR."):
        with pytest.raises(ValueError, match="it asks for "):
            unpickle("b", code)
    assert not list(tmp_path.iterdir())
    arrays = {"data": np.arange(6, dtype=np.uint8).reshape(2, 3), b"name": "x", "labels": [1, 2]}
    for protocol in range(6):
        again = unpickle("b", pickle.dumps(arrays, protocol))
        assert np.array_equal(again["data"], arrays["data"])
        assert again["name"] == "x"


def changed(files, name, **new):
    return {**files, name: pickle2(new)}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f: {**f, "data_batch_2": f["data_batch_2"][:-40]}, "data_batch_2: expected a whole pickle"),
        (lambda f: {**f, "data_batch_2": b"GIF89a"}, "data_batch_2: expected a whole pickle"),
        (
            lambda f: {**f, "test_batch": pickle2({"labels": [1]})},
            r"expected uint8 \[N, 3072\] under data",
        ),
        (
            lambda f: changed(f, "test_batch", data=np.zeros((2, 3072), np.uint8), labels=[1]),
            "test_batch: expected 2 whole numbers under labels",
        ),
        (
            lambda f: changed(f, "test_batch", data=np.zeros((1, 3072), np.uint8), labels=[9]),
            "test_labels: expected 0 to 3; got 9 to 9",
        ),
        (lambda f: {k: v for k, v in f.items() if k != "test_batch"}, "test_batch"),
        (lambda f: changed(f, "batches.meta", other=["a"]), "batches.meta: expected a list of names"),
    ],
)
def test_bad_cifar_files_are_named(change, message, tmp_path):
    files = change(cifar_files("cifar10", 4))
    write_folder(files, tmp_path / "cifar-10-batches-py")
    write_tar(files, tmp_path / "one.tar.gz", "cifar-10-batches-py")
    for place in (tmp_path, tmp_path / "one.tar.gz"):
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            load("cifar10", place)


def test_archives_stay_in_their_folder(tmp_path):
    path = tmp_path / "bad.tar.gz"
    for name in ("../evil", "/tmp/evil", "cifar-10-batches-py/../../evil"):
        write_tar({name: b"x"}, path)
        with pytest.raises(ValueError, match=r"bad\.tar\.gz: expected an archive that stays in its own folder, got"):
            load("cifar10", path)
    with tarfile.open(path, "w") as tar:
        link = tarfile.TarInfo("link")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc"
        tar.addfile(link)
    with pytest.raises(ValueError, match="expected an archive of files and folders, got a link"):
        load("cifar10", path)
    write_tar(cifar_files("cifar10", 4), path, "cifar-10-batches-py")
    whole = path.read_bytes()
    for content in (b"", b"GIF89a", whole[: len(whole) // 2]):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"bad\.tar\.gz: expected a whole tar archive, got a damaged or foreign"):
            load("cifar10", path)
    assert [p.name for p in tmp_path.iterdir()] == ["bad.tar.gz"]


# ---------------------------------------------------------------- CIFAR-10-C


@pytest.fixture
def corrupted(tmp_path):
    folder = tmp_path / "CIFAR-10-C"
    folder.mkdir()
    for name in ("fog", "contrast", "saturate"):
        np.save(folder / f"{name}.npy", RANDOM.integers(0, 256, (30, 32, 32, 3), np.uint8))
    np.save(folder / "labels.npy", np.tile(np.arange(6) % 4, 5))
    return folder


def test_corrupted_files_yield_each_severitys_rows(corrupted):
    files = CorruptedFiles(corrupted, (32, 32, 3), 4)
    assert files.names == ("fog", "contrast", "saturate")
    fog = np.load(corrupted / "fog.npy")
    for name, severity, images, labels in files:
        assert labels.tolist() == [0, 1, 2, 3, 0, 1]
        if name == "fog":
            assert np.array_equal(images, fog[6 * severity - 6 : 6 * severity])
    assert severity == 5


def test_bad_corrupted_files_are_named(corrupted):
    def refused(message, **arguments):
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            CorruptedFiles(**({"folder": corrupted, "shape": (32, 32, 3), "classes": 4} | arguments))

    refused(r"labels\.npy: expected 0 to 2, got 0 to 3", classes=3)
    refused(r"fog\.npy: expected uint8 \[30, 28, 28\], got uint8 \[30, 32, 32, 3\]", shape=(28, 28))
    refused("corrupted_dir: expected a folder of", folder=corrupted / "no")
    np.save(corrupted / "contrast.npy", np.array([Evil()], dtype=object), allow_pickle=True)
    refused(r"contrast\.npy: expected a whole \.npy file of numbers")
    whole = (corrupted / "fog.npy").read_bytes()
    for content in (whole[:-1], whole[:20], b"", b"GIF89a"):
        (corrupted / "fog.npy").write_bytes(content)
        refused(r"fog\.npy: expected a whole \.npy file of numbers")
    (corrupted / "labels.npy").unlink()
    refused(r"labels\.npy: expected a file that is there")


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
    (tmp_path / "one" / "cat" / ".DS_Store").write_bytes(b"x")
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
    dog = np.asarray(Image.open(tmp_path / "two" / "train" / "dog" / "1.png"))
    (place,) = [i for i, x in enumerate(two.train_images.numpy()) if np.array_equal(x, dog)]
    assert two.train_labels[place] == 1


def test_grey_images_stay_grey_unless_there_are_others(tmp_path):
    folder_of(tmp_path, color=False)
    assert load("folder", tmp_path).train_images.ndim == 3
    image(tmp_path / "cat" / "colour.png", mode="P")
    assert load("folder", tmp_path).train_images.shape[3] == 3


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
        (lambda d: [p.unlink() for p in d.rglob("[1-9].png")], "labels: expected 2 samples or more of every class"),
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
    with pytest.raises(FileNotFoundError, match="data_dir: expected a folder test/ beside"):
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
    path.write_text(path.read_text().replace("label", "colour"))
    with pytest.raises(ValueError, match=r"t\.csv, row 1: expected a number as 'colour', got 'a'"):
        load("table", path)  # then the last column is the label


NAN = features()
NAN["x"][7, 2] = np.nan


@pytest.mark.parametrize(
    ("data", "content", "message"),
    [
        ("npz", {"images": arrays()["images"]}, "expected arrays train_images.*, got images$"),
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
        ("table", NAN, "x: expected finite numbers, got nan at row 7, column 2"),
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
        ("", "expected a line of names"),
        ("a,label\n", "expected rows of features and a label"),
        ("a,label\n1,0\nnan,1\n", "row 2: expected a finite 'a', got 'nan'"),
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


def test_a_run_on_cifar_with_its_corrupted_copies(tmp_path, corrupted, capsys):
    write_folder(cifar_files("cifar10", 4), tmp_path / "cifar-10-batches-py")
    arguments = ("--data", "cifar10", "--data-dir", tmp_path, "--corrupted-dir", corrupted, "--validation", 0.25)
    arguments += ("--method", "forde-identity")  # a PCA of 3072 values takes half a minute
    out, metrics = trained(tmp_path, *arguments)
    by_name = metrics["corrupted"]["by_corruption"]
    assert set(by_name) == {"fog", "contrast", "saturate"}
    mean = {name: np.mean([s["nll"] for s in scores.values()]) for name, scores in by_name.items()}
    assert metrics["corrupted"]["nll"] == pytest.approx(np.mean([mean["fog"], mean["contrast"]]))
    assert metrics["corrupted_all"]["nll"] == pytest.approx(np.mean(list(mean.values())))
    epochs = [json.loads(line) for line in (out / "epochs.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in epochs] == [0, 1]
    assert epochs[-1]["validation_nll"] == pytest.approx(metrics["validation"]["nll"], rel=1e-5)
    capsys.readouterr()
    assert cli.main(["evaluate", str(out), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["forde-identity"]["corrupted"] == metrics["corrupted"]


def test_a_run_on_images_of_ones_own(tmp_path):
    folder_of(tmp_path / "pets", count=20)
    out, metrics = trained(
        tmp_path, "--data", "folder", "--data-dir", tmp_path / "pets", "--model", "cnn", "--augment"
    )
    assert len(metrics["clean"]["members"]) == 2
    assert (out / "predictions.png").exists()


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
