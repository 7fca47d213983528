"""CIFAR's files and CIFAR-10-C's, in small files of the real layout; and one clear line for what is bad."""

import io
import json
import pickle
import struct
import tarfile

import numpy as np
import pytest
import torch
from test_own_data import Evil, trained

from forde_fast import cli
from forde_fast.data import CorruptedFiles, cifar, load
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
    advice = (
        r"name a folder that holds cifar-10-.* \(--data-dir, --ood-dir\), or fetch it by .*\('cifar10', download=True"
    )
    with pytest.raises(FileNotFoundError, match=rf"cifar-10-python\.tar\.gz: expected .*, got none; {advice}"):
        load("cifar10", tmp_path)
    write_tar(cifar_files("cifar10", 2), tmp_path / "cifar-10-python.tar.gz", "cifar-10-batches-py")
    monkeypatch.setenv("FORDE_FAST_CACHE", str(tmp_path / "cache"))
    archive = cifar.Archive(**{**vars(ARCHIVES["cifar10"]), "url": (tmp_path / "cifar-10-python.tar.gz").as_uri()})
    monkeypatch.setitem(ARCHIVES, "cifar10", archive)
    with pytest.raises(ValueError, match=f"expected a file with md5 {archive.md5}, got "):
        load("cifar10", download=True)
    assert not list((tmp_path / "cache").iterdir())


def test_a_fetch_that_fails_names_the_set_and_the_address(tmp_path, monkeypatch, capsys):
    url = "http://127.0.0.1:9/cifar-10-python.tar.gz"  # nobody listens there
    monkeypatch.setitem(ARCHIVES, "cifar10", cifar.Archive(**{**vars(ARCHIVES["cifar10"]), "url": url}))
    monkeypatch.setenv("FORDE_FAST_CACHE", str(tmp_path / "cache"))
    with pytest.raises(SystemExit) as stop:
        cli.main(["train", "--data", "cifar10", "--download", "--out", str(tmp_path / "out")])
    error = capsys.readouterr().err
    assert stop.value.code == 2
    assert f"cifar10: expected a file from {url}, got [Errno" in error
    assert "--data-dir takes a folder with the file, fetched by hand" in error
    assert error.count("\n") == 1
    assert not list((tmp_path / "cache").iterdir())


def test_published_addresses_and_checksums():
    assert ARCHIVES["cifar10"].md5 == "c58f30108f718f92721af3b95e74349a"
    assert ARCHIVES["cifar100"].md5 == "eb9058c3a382ffc7106e4002c42a8d85"
    assert len(STANDARD) == 15
    assert len(set(STANDARD + EXTRA)) == 19


def test_pickles_run_no_code(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for protocol in range(6):
        with pytest.raises(ValueError, match=r"^b: expected a whole pickle of arrays that runs no code, got .*open"):
            unpickle("b", pickle.dumps({"data": Evil()}, protocol))
    for code in (b"cos\nsystem\n(S'touch evil'\ntR.", b"cnumpy\nload\n(S'evil'\ntR.", b"cbuiltins\neval\n(S'1'\ntR."):
        with pytest.raises(ValueError, match="it asks for "):
            unpickle("b", code)
    with pytest.raises(ValueError, match="it changes a "):  # the attributes of a function
        unpickle("b", b"c_codecs\nencode\n}S'x'\nI1\nsb.")
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
            "test_labels: expected values from 0 to 3, got values from 9 to 9",
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
