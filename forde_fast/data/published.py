"""TinyImageNet and SVHN as published: class folders of JPEGs, and MATLAB files."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from forde_fast.data.own import Parts, read_image
from forde_fast.validation import expect, reason_of

MOST_IMAGES = 10**6  # of SVHN, whose largest part has 531,131: compressed, a small file may claim any number
TINY_SIZE = (64, 64)
TINY_MEAN = tuple(level / 255 for level in (122.4786, 114.2755, 101.3963))
TINY_STD = tuple(level / 255 for level in (70.4924, 68.5679, 71.8127))


def load_tiny_imagenet(folder: Path) -> Parts:
    """tiny-imagenet-200, or a folder that holds it: wnids.txt, words.txt, train/<wnid>/images/*.JPEG and
    val/images with val_annotations.txt, which is the test part, the published one having no labels.

    uint8 [N, 64, 64, 3], grey images as RGB. A class's name is its wnid and its first word. Raises
    FileNotFoundError or ValueError in one line.
    """
    expect(folder.is_dir(), "data_dir", "the folder tiny-imagenet-200", folder, FileNotFoundError)
    if (folder / "tiny-imagenet-200").is_dir():
        folder = folder / "tiny-imagenet-200"
    wnids = _lines(folder / "wnids.txt")
    good = all(map(_plain, wnids)) and len(set(wnids)) == len(wnids) >= 2
    expect(good, str(folder / "wnids.txt"), "2 wnids or more, each once", f"{len(wnids)} lines of another kind")
    words = dict(line.split("\t", 1) for line in _lines(folder / "words.txt") if "\t" in line)
    label_of = {wnid: label for label, wnid in enumerate(wnids)}
    train, test = [], []
    for wnid, label in label_of.items():
        place = folder / "train" / wnid / "images"
        expect(place.is_dir(), str(place), "a folder that is there", "none", FileNotFoundError)
        files = sorted(path for path in place.iterdir() if not path.name.startswith("."))
        expect(bool(files), str(place), "at least one image", "an empty folder")
        train += [(path, label) for path in files]
    notes = folder / "val" / "val_annotations.txt"
    for number, line in enumerate(_lines(notes), 1):
        name, wnid = (*line.split("\t"), "")[:2]
        known = wnid in label_of and _plain(name)
        expect(known, f"{notes}, line {number}", "a file name and a wnid of wnids.txt", repr(line[:60]))
        test.append((folder / "val" / "images" / name, label_of[wnid]))
    arrays = [array for files in (train, test) for array in _read(files)]
    return arrays, tuple(f"{wnid} {words.get(wnid, '').split(',')[0]}".strip() for wnid in wnids)


def _plain(name: str) -> bool:
    """Whether it is the name of a file alone: with folders in it it would lead elsewhere."""
    return Path(name).name == name and name.isprintable() and len(name.encode()) < 256


def _lines(path: Path) -> list[str]:
    """The lines of a text file that hold something. Raises FileNotFoundError, or ValueError for what is no text."""
    expect(path.is_file(), str(path), "a file that is there", "none", FileNotFoundError)
    try:
        return [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: expected text, got other bytes ({error})") from None


def _read(files: list[tuple[Path, int]]) -> tuple[np.ndarray, np.ndarray]:
    images = np.empty((len(files), *TINY_SIZE, 3), np.uint8)  # 1.2 GB of training images: never held twice
    for image, (path, _) in zip(images, files, strict=True):
        pixels = read_image(path, TINY_SIZE)
        image[:] = pixels[..., None] if pixels.ndim == 2 else pixels
    return images, np.array([label for _, label in files], np.int64)


def load_svhn(folder: Path) -> Parts:
    """Street View House Numbers: train_32x32.mat and test_32x32.mat in a folder, the digit 0 stored as class 10.

    uint8 [N, 32, 32, 3]. Raises FileNotFoundError, or ValueError for damaged or foreign files.
    """
    arrays = [array for part in ("train", "test") for array in read_svhn(folder / f"{part}_32x32.mat")]
    return arrays, tuple("0123456789")


def read_svhn(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Images and labels of one file. Shapes and types are looked at before any array is read."""
    from scipy.io import loadmat, whosmat

    expect(path.is_file(), str(path), "a file that is there", "none", FileNotFoundError)
    try:
        kinds = {name: (list(shape), kind) for name, shape, kind in whosmat(path)}
        stored = loadmat(path, variable_names=["X", "y"]) if _is_svhn(kinds) else {}
    except Exception as error:  # a damaged file raises whatever the reader stumbles over
        reason = reason_of(error)
        raise ValueError(f"{path}: expected a whole MATLAB 5 file, got another ({reason})") from None
    expect(bool(stored), str(path), "uint8 X [32, 32, 3, N] and y [N, 1]", kinds)
    labels = stored["y"][:, 0]
    expect(bool(np.isin(labels, range(1, 11)).all()), str(path), "labels from 1 to 10", "others")
    return np.ascontiguousarray(stored["X"].transpose(3, 0, 1, 2)), labels.astype(np.int64) % 10


def _is_svhn(kinds: dict[str, tuple[list[int], str]]) -> bool:
    images, labels = kinds.get("X"), kinds.get("y")
    if images is None or labels is None or images[1] != "uint8" or len(images[0]) != 4:
        return False
    count = images[0][3]
    numbers = labels[1].startswith(("int", "uint", "double"))
    plausible = 0 < count <= MOST_IMAGES
    return images[0] == [32, 32, 3, count] and labels[0] == [count, 1] and plausible and numbers
