"""A user's own data: class folders of images, arrays, a table of features; and stratified parts of them."""

from __future__ import annotations

import csv
import warnings
import zlib
from pathlib import Path

import numpy as np

from forde_fast.data.cifar import load_npy
from forde_fast.validation import expect, reason_of

TEST_SHARE = 0.2  # held out where the data have no test part of their own
INPUTS = ("images", "features", "x")
LABELS = ("labels", "y")
LARGEST = float(np.finfo(np.float32).max)  # of a feature
MODES = {"1": "L", "L": "L", "P": "RGB", "RGB": "RGB", "RGBA": "RGB", "CMYK": "RGB", "LA": "L", "YCbCr": "RGB"}

Parts = tuple[list[np.ndarray], tuple[str, ...]]  # train inputs, train labels, test inputs, test labels; classes


def stratified(labels: np.ndarray, share: float, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Two sorted index arrays, rest and held: of each class about `share` is held, and at least one stays."""
    draw, held = np.random.default_rng([seed, len(labels)]), []
    for label in np.unique(labels):
        own = draw.permutation(np.flatnonzero(labels == label))
        held.append(own[: min(max(1, round(share * len(own))), len(own) - 1)])
    held = np.sort(np.concatenate(held)) if held else np.arange(0)
    return np.setdiff1d(np.arange(len(labels)), held), held


def load_folder(folder: Path) -> Parts:
    """`folder/train/<class>/<image>` and `folder/test/...`, or `folder/<class>/<image>` with a part held out.

    All images have one size; they are grey if all files are, else RGB. Raises FileNotFoundError or ValueError.
    """
    expect(folder.is_dir(), "data_dir", "a folder of class folders", folder, FileNotFoundError)
    if not (folder / "train").is_dir():
        classes = _class_names(folder)
        return _parts(*_read_classes(folder, classes), None, None, classes)
    test = folder / "test"
    expect(test.is_dir(), "data_dir", f"a folder test/ beside {folder / 'train'}", "none", FileNotFoundError)
    classes = _class_names(folder / "train")
    other = [name for name in _class_names(test) if name not in classes]
    expect(not other, str(test), "the classes of train/", f"{other[0] if other else ''} besides")
    present = tuple(name for name in classes if (test / name).is_dir())
    train, test = _read_classes(folder / "train", classes), _read_classes(test, present, classes)
    if train[0].ndim != test[0].ndim:  # one part is all grey
        train, test = ((np.stack([x] * 3, -1) if x.ndim == 3 else x, y) for x, y in (train, test))
    return _parts(*train, *test, classes)


def _class_names(folder: Path) -> tuple[str, ...]:
    names = sorted(path.name for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    expect(len(names) >= 2, str(folder), "a folder for each of 2 classes or more", f"{len(names)}")
    return tuple(names)


def _read_classes(folder: Path, names: tuple[str, ...], classes: tuple[str, ...] | None = None):
    """Images [N, H, W] or [N, H, W, 3] and labels of the folders `names`, numbered as in `classes`."""
    images, labels = [], []
    for name in names:
        files = [path for path in sorted((folder / name).iterdir()) if not path.name.startswith(".")]
        expect(len(files) > 0, str(folder / name), "at least one image", "an empty folder")
        for path in files:
            images.append(read_image(path, images[0].shape[:2] if images else None))
            labels.append((classes or names).index(name))
    if any(image.ndim == 3 for image in images):
        images = [np.stack([image] * 3, -1) if image.ndim == 2 else image for image in images]
    return np.stack(images), np.array(labels, np.int64)


def read_image(path: Path, shape: tuple[int, int] | None) -> np.ndarray:
    """uint8 [H, W] or [H, W, 3]. The size is looked at before anything is decoded."""
    from PIL import Image

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path) as image:
                size = image.height, image.width
                expect(shape in (None, size), str(path), f"{shape} pixels as the images before", size)
                expect(image.mode in MODES, str(path), "8 bits per channel", f"mode {image.mode}")
                return np.asarray(image.convert(MODES[image.mode]))
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise ValueError(f"{path}: expected an image of a plausible size, got a decompression bomb") from None
    except (OSError, SyntaxError, EOFError, zlib.error) as error:
        raise ValueError(f"{path}: expected a whole image file, got a damaged or foreign one ({error})") from None


def load_arrays(path: Path, table: bool) -> Parts:
    """A .npz file, or a folder of .npy files, with arrays `images`, `features` or `x` and `labels` or `y`, each
    for both parts as train_... and test_..., or once. `table`: float features [N, F]; else uint8 images.
    """
    expect(path.exists(), "data_dir", "an .npz file or a folder of .npy files", path, FileNotFoundError)
    arrays = {file.stem: load_npy(file) for file in path.glob("*.npy")} if path.is_dir() else _read_npz(path)
    found = {}
    for part in ("train_", "test_", ""):
        for kind, names in (("inputs", INPUTS), ("labels", LABELS)):
            name = next((part + name for name in names if part + name in arrays), None)
            if name is not None:
                found[part + kind] = (name, arrays[name])
    both = all(f"{part}_{kind}" in found for part in ("train", "test") for kind in ("inputs", "labels"))
    wanted = "arrays train_images, train_labels, test_images, test_labels, or images and labels"
    held = ", ".join(sorted(arrays)) or "none"
    expect(both or {"inputs", "labels"} <= found.keys(), str(path), wanted, held)
    parts = []
    for part in ("train_", "test_") if both else ("",):
        (name, x), (label_name, y) = found[part + "inputs"], found[part + "labels"]
        parts += [_features(x, f"{path}: {name}") if table else _pixels(x, f"{path}: {name}")]
        parts += [_whole(y, len(x), f"{path}: {label_name}")]
    classes = _numbered(int(parts[1].max()), len(parts[1]), str(path))
    return _parts(*parts, *([] if both else [None, None]), classes)


def _read_npz(path: Path) -> dict[str, np.ndarray]:
    try:
        with np.load(path, allow_pickle=False) as stored:
            if isinstance(stored, np.ndarray):
                raise ValueError("one array")
            arrays = {name: stored[name] for name in stored.files}
            if not all(isinstance(array, np.ndarray) for array in arrays.values()):  # NumPy gives others as bytes
                raise ValueError("a member that is no array")
            return arrays
    except Exception as error:  # a damaged archive raises whatever its headers stumble over
        reason = reason_of(error)
        raise ValueError(f"{path}: expected a whole .npz file of numbers, got another ({reason})") from None


def _pixels(x: np.ndarray, name: str) -> np.ndarray:
    good = x.dtype == np.uint8 and (x.ndim == 3 or (x.ndim == 4 and x.shape[3] in (1, 3))) and x.size > 0
    expect(good, name, "uint8 [N, H, W] or [N, H, W, C] with C 1 or 3", f"{x.dtype} {list(x.shape)}")
    return x


def _features(x: np.ndarray, name: str) -> np.ndarray:
    good = x.dtype.kind == "f" and x.ndim == 2 and x.size > 0
    expect(good, name, "floating features [N, F]", f"{x.dtype} {list(x.shape)}")
    bad = ~(np.abs(x) <= LARGEST)
    if bad.any():
        row, column = np.argwhere(bad)[0]
        got = f"{x[row, column]} at row {row}, column {column}"
        raise ValueError(f"{name}: expected finite numbers of float32, got {got}")
    return x.astype(np.float32)


def _whole(y: np.ndarray, count: int, name: str) -> np.ndarray:
    good = y.dtype.kind in "iu" and y.shape == (count,)
    expect(good, name, f"whole numbers [{count}], one per sample", f"{y.dtype} {list(y.shape)}")
    expect(int(y.min()) >= 0, name, "labels from 0", int(y.min()))
    return y.astype(np.int64)


def load_csv(path: Path) -> Parts:
    """A table with a line of names first, a column `label` (else the last one) of numbers or names, and numbers."""
    with open(path, newline="", encoding="utf-8-sig") as file:  # a spreadsheet may have put its mark first
        try:
            head, *rows = [row for row in csv.reader(file) if row]
        except (ValueError, csv.Error) as error:
            raise ValueError(
                f"{path}: expected a line of names and rows of numbers, got {reason_of(error)}"
            ) from None
    head = [name.strip() for name in head]
    expect(len(rows) > 0 and len(head) >= 2, str(path), "rows of features and a label", f"{len(rows)} rows")
    at = head.index("label") if "label" in head else len(head) - 1
    features = np.empty((len(rows), len(head) - 1), np.float32)
    for i, row in enumerate(rows):
        expect(len(row) == len(head), f"{path}, row {i + 1}", f"{len(head)} values", len(row))
        for j, (column, text) in enumerate((c, v) for k, (c, v) in enumerate(zip(head, row, strict=True)) if k != at):
            try:
                value = float(text)
            except ValueError:
                got = f"expected a number as {column!r:.42}, got {text!r:.42}"
                raise ValueError(f"{path}, row {i + 1}: {got}") from None
            finite = abs(value) <= LARGEST
            expect(finite, f"{path}, row {i + 1}", f"a finite {column!r:.42} of float32", f"{text!r:.42}")
            features[i, j] = value
    texts = [row[at].strip() for row in rows]
    numeric = all(text.isdecimal() and len(text) < 10 for text in texts)
    classes = _numbered(max(map(int, texts)), len(rows), str(path)) if numeric else tuple(sorted(set(texts)))
    labels = np.array([int(text) if numeric else classes.index(text) for text in texts], np.int64)
    return _parts(features, labels, None, None, classes)


def _numbered(largest: int, samples: int, name: str) -> tuple[str, ...]:
    """The names of classes 0 to `largest`, each of which has a sample to train on."""
    expect(largest < samples, name, f"labels below {samples}, the number of samples", largest)
    return tuple(map(str, range(largest + 1)))


def _parts(x, y, test_x, test_y, classes) -> Parts:
    """The four arrays, the training ones in an order of chance (files come class by class), a test part held out
    where there is none; every class has samples to train on."""
    counts = np.bincount(y, minlength=len(classes))
    missing = [name for name, count in zip(classes, counts, strict=True) if count == 0]
    expect(len(classes) >= 2, "labels", "2 classes or more", len(classes))
    expect(not missing, "labels", "samples of every class", f"none of class {', '.join(missing)[:80]}")
    if test_x is None:
        expect(int(counts.min()) >= 2, "labels", "2 samples or more of every class", int(counts.min()))
        rest, held = stratified(y, TEST_SHARE)
        x, y, test_x, test_y = x[rest], y[rest], x[held], y[held]
    order, test_order = (np.random.default_rng(0).permutation(len(labels)) for labels in (y, test_y))
    return [x[order], y[order], test_x[test_order], test_y[test_order]], classes
