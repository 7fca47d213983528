"""CIFAR-10 and CIFAR-100 as published: an archive of pickles, or its folder.

Nothing is unpacked and nothing in a file can run code: members are read from the archive into memory, and the
unpickler knows the few names that a NumPy array needs.
"""

from __future__ import annotations

import io
import pickle
import re
import tarfile
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import ClassVar

import numpy as np

from forde_fast.data.download import advice, cache, download
from forde_fast.validation import expect, reason_of


@dataclass(frozen=True)
class Archive:
    """Where a set is published and how it is laid out: files of pickled dicts with "data" and a key of labels."""

    url: str
    md5: str
    folder: str
    train: tuple[str, ...]
    test: tuple[str, ...]
    labels: str
    meta: tuple[str, str]  # a file and its key of the classes' names
    mean: tuple[float, ...]
    std: tuple[float, ...]


ARCHIVES = {
    "cifar10": Archive(
        "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz",
        "c58f30108f718f92721af3b95e74349a",
        "cifar-10-batches-py",
        tuple(f"data_batch_{i}" for i in range(1, 6)),
        ("test_batch",),
        "labels",
        ("batches.meta", "label_names"),
        (0.4914, 0.4822, 0.4465),
        (0.2470, 0.2435, 0.2616),
    ),
    "cifar100": Archive(
        "https://www.cs.toronto.edu/~kriz/cifar-100-python.tar.gz",
        "eb9058c3a382ffc7106e4002c42a8d85",
        "cifar-100-python",
        ("train",),
        ("test",),
        "fine_labels",
        ("meta", "fine_label_names"),
        (0.5071, 0.4865, 0.4409),
        (0.2673, 0.2564, 0.2762),
    ),
}

MOST_BYTES = 1 << 28  # of one file in an archive: CIFAR-100's training images are 155 MB


def load_cifar(name: str, folder: Path | None, fetch: bool) -> tuple[list[np.ndarray], tuple[str, ...]]:
    """[train images uint8 [N, 32, 32, 3], train labels, test images, test labels], names of the classes.

    folder  the extracted folder, one that holds it or the archive, or the archive itself; None: the cache
    """
    archive = ARCHIVES[name]
    read = _reader(name, folder, fetch)
    parts = []
    for files in (archive.train, archive.test):
        pairs = [_images_and_labels(file, read(file), archive.labels) for file in files]
        parts += [np.concatenate(arrays) for arrays in zip(*pairs, strict=True)]
    file, key = archive.meta
    names = unpickle(file, read(file)).get(key)
    good = isinstance(names, list) and names and all(isinstance(one, str) for one in names)
    expect(good, file, f"a list of names under {key}", type(names).__name__)
    return parts, tuple(names)


def _reader(set_name: str, folder: Path | None, fetch: bool):
    """name -> bytes, from the folder or the archive, whichever is there."""
    archive = ARCHIVES[set_name]
    file = PurePosixPath(archive.url).name
    place = cache() if folder is None else folder
    for path in (place, place / archive.folder):
        if (path / archive.meta[0]).is_file():
            return lambda name: _read(path / name)
    path = place if place.is_file() else place / file
    if not path.is_file():
        got = f"none; {advice(set_name, f'{archive.folder}/ or {file}')}"
        expect(fetch, str(path), "a file that is there", got, FileNotFoundError)
        download(set_name, archive.url, archive.md5, path)
    members = read_tar(path)
    return lambda name: _member(path, members, f"{archive.folder}/{name}")


def _read(path: Path) -> bytes:
    expect(path.is_file(), str(path), "a file that is there", "none", FileNotFoundError)
    return path.read_bytes()


def _member(path: Path, members: dict[str, bytes], name: str) -> bytes:
    expect(name in members, str(path), f"an archive that holds {name}", "one without it")
    return members[name]


def read_tar(path: Path) -> dict[str, bytes]:
    """The files of a tar archive, compressed or not, in memory. Raises ValueError for a damaged or foreign file,
    for a member that lies outside the archive's folder or is a link, and for one of more than MOST_BYTES."""
    members, refused, total = {}, None, 0
    try:
        with tarfile.open(path) as tar:
            for member in tar:
                total += member.size
                refused = _refusal(member, total)
                if refused:
                    break
                if member.isfile():
                    members[str(PurePosixPath(member.name))] = tar.extractfile(member).read()
    except Exception as error:  # a damaged archive raises whatever its headers stumble over
        reason = reason_of(error)
        raise ValueError(f"{path}: expected a whole tar archive, got a damaged or foreign file ({reason})") from None
    expect(not refused, str(path), *(refused or ("", "")))
    return members


def _refusal(member: tarfile.TarInfo, total: int) -> tuple[str, str] | None:
    """What was expected of an archive's member, and what it is; None for one that may be read."""
    name = PurePosixPath(member.name)
    if name.is_absolute() or ".." in name.parts:
        return "an archive that stays in its own folder", f"a member {member.name!r}"
    if not (member.isfile() or member.isdir()):
        return "an archive of files and folders", f"a link or device {member.name!r}"
    if member.size > MOST_BYTES or total > 4 * MOST_BYTES:
        return (
            f"files of at most {MOST_BYTES} bytes, and 4 times as many together",
            f"{member.name!r} ({member.size})",
        )
    return None


def _images_and_labels(file: str, content: bytes, key: str) -> tuple[np.ndarray, np.ndarray]:
    stored = unpickle(file, content)
    data, labels = stored.get("data"), stored.get(key)
    good = isinstance(data, np.ndarray) and data.dtype == np.uint8 and data.ndim == 2 and data.shape[1] == 3072
    expect(good, file, "uint8 [N, 3072] under data", getattr(data, "shape", type(data).__name__))
    known = isinstance(labels, list) and all(type(label) is int for label in labels) and len(labels) == len(data)
    expect(known, file, f"{len(data)} whole numbers under {key}", type(labels).__name__ if not known else "")
    return data.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1), np.array(labels, np.int64)


class _Type:
    """What a pickle says of a NumPy type. NumPy's own reader trusts pickles to be NumPy's; others make it crash."""

    def __init__(self, name: str, *_):
        expect(re.fullmatch("[<>|=]?[biuf][1248]", name) is not None, "dtype", "a type of numbers", repr(name))
        self.name = name

    def __setstate__(self, state: tuple):
        order = state[1]
        expect(order in ("<", ">", "|", "="), "dtype", "an order of bytes", repr(order))
        self.name = order + self.name.lstrip("<>|=")


class _Array:
    """What a pickle says of a NumPy array."""

    value = None

    @classmethod
    def reconstruct(cls, *_) -> _Array:
        return cls()

    @classmethod
    def from_buffer(cls, content: bytes, kind: _Type, shape: tuple, order: str) -> _Array:
        self = cls()
        self.__setstate__((1, shape, kind, order == "F", content))
        return self

    def __setstate__(self, state: tuple):
        _, shape, kind, columns_first, content = state
        content = content.encode("latin1") if isinstance(content, str) else content  # Python 2 made no difference
        flat = np.frombuffer(content, np.dtype(kind.name))
        self.value = flat.reshape(shape, order="F" if columns_first else "C").copy()


def _latin1(text: str, encoding: str = "latin1") -> bytes:
    """What Python 3 writes for bytes in pickles of Python 2's protocol; codecs.encode itself reaches further."""
    expect(encoding == "latin1", "encoding", "latin1", repr(encoding))
    return text.encode("latin1")


class _ArraysOnly(pickle._Unpickler):
    """Knows what NumPy arrays are made of, and nothing else. Python's own unpickler in Python: the one in C believes
    what a pickle says of sizes, and can be made to crash."""

    names: ClassVar = {
        ("numpy", "ndarray"): _Array,
        ("numpy", "dtype"): _Type,
        ("numpy.core.multiarray", "_reconstruct"): _Array.reconstruct,
        ("numpy.core.numeric", "_frombuffer"): _Array.from_buffer,
        ("_codecs", "encode"): _latin1,
    }
    dispatch: ClassVar = dict(pickle._Unpickler.dispatch)

    def find_class(self, module: str, name: str):
        known = self.names.get((module.replace("numpy._core", "numpy.core"), name))
        if known is None:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}")
        return known

    def load_build(self):
        if not isinstance(self.stack[-2], (_Array, _Type)):  # a state may be any attributes, of functions too
            raise pickle.UnpicklingError(f"it changes a {type(self.stack[-2]).__name__}")
        super().load_build()

    dispatch[pickle.BUILD[0]] = load_build


def unpickle(name: str, content: bytes) -> dict:
    """A pickled dict of arrays, lists, texts and numbers; its keys as text. Raises ValueError for anything else."""
    try:
        stored = _ArraysOnly(io.BytesIO(content), encoding="latin1").load()
    except Exception as error:  # a damaged pickle raises whatever its opcodes stumble over
        reason = reason_of(error)
        raise ValueError(
            f"{name}: expected a whole pickle of arrays that runs no code, got another ({reason})"
        ) from None
    expect(isinstance(stored, dict), name, "a pickled dict", type(stored).__name__)
    return {
        key.decode("latin1") if isinstance(key, bytes) else key: value.value if isinstance(value, _Array) else value
        for key, value in stored.items()
    }


def load_npy(path: Path) -> np.ndarray:
    """A .npy file, mapped; ValueError for a damaged or foreign one."""
    expect(path.is_file(), str(path), "a file that is there", "none", FileNotFoundError)
    try:
        return np.load(path, mmap_mode="r", allow_pickle=False)
    except Exception as error:  # NumPy parses the header as Python's syntax, with whatever that raises
        reason = reason_of(error)
        raise ValueError(f"{path}: expected a whole .npy file of numbers, got another ({reason})") from None
