"""A user's own data: class folders of images, arrays, a table of features; and stratified parts of them."""

from __future__ import annotations

import csv
import warnings
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from forde_fast.data.cifar import load_npy
from forde_fast.data.corruptions.colour import LUMINANCE
from forde_fast.validation import expect, reason_of

TEST_SHARE = 0.2  # held out where the data have no test part of their own
INPUTS = ("images", "features", "x")
LABELS = ("labels", "y")
LARGEST = float(np.finfo(np.float32).max)  # of a feature
LEFT_BY_SYSTEMS = ("thumbs.db", "desktop.ini")  # in folders of images, beside files that begin with a dot
ORIENTATION = 0x0112  # EXIF's tag
HINT = "; --image-size N makes them one size"
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


def load_folder(folder: Path, size: int | None = None) -> Parts:
    """`folder/train/<class>/<image>` and `folder/test/...`; or `folder/train/...` alone, or `folder/<class>/<image>`,
    with a part held out.

    All images have one size, or are brought to size x size; they are grey if all files are, else RGB. Raises
    FileNotFoundError or ValueError.
    """
    expect(folder.is_dir(), "data_dir", "a folder of class folders", folder, FileNotFoundError)
    train, test = folder / "train", folder / "test"
    if not train.is_dir():
        classes = _class_names(folder)
        return _parts(*_read_classes(folder, classes, size=size), None, None, classes)
    classes = _class_names(train)
    if not test.is_dir():
        other = [path.name for path in _visible(folder) if path.is_dir() and path != train]  # val/, or more classes
        expect(not other, str(folder), "train/ and test/, or train/ alone", f"{', '.join(other)[:80]} besides")
        return _parts(*_read_classes(train, classes, size=size), None, None, classes)
    other = [name for name in _class_names(test) if name not in classes]
    expect(not other, str(test), "the classes of train/", f"{other[0] if other else ''} besides")
    present = tuple(name for name in classes if (test / name).is_dir())
    place, train, test = test, _read_classes(train, classes, size=size), _read_classes(test, present, classes, size)
    wanted, got = (list(x.shape[1:3]) for x, _ in (train, test))
    expect(got == wanted, str(place), f"images of {wanted} pixels as in train/", f"{got}{HINT}")
    if train[0].ndim != test[0].ndim:  # one part is all grey
        train, test = ((np.stack([x] * 3, -1) if x.ndim == 3 else x, y) for x, y in (train, test))
    return _parts(*train, *test, classes)


def _visible(folder: Path) -> list[Path]:
    """What is in a folder, in order, without what systems leave there unseen."""
    names = sorted(path.name for path in folder.iterdir())
    return [folder / name for name in names if not name.startswith(".") and name.lower() not in LEFT_BY_SYSTEMS]


def _class_names(folder: Path) -> tuple[str, ...]:
    names = [path.name for path in _visible(folder) if path.is_dir()]
    expect(len(names) >= 2, str(folder), "a folder for each of 2 classes or more", f"{len(names)}")
    return tuple(names)


def _read_classes(
    folder: Path, names: tuple[str, ...], classes: tuple[str, ...] | None = None, size: int | None = None
):
    """Images [N, H, W] or [N, H, W, 3] and labels of the folders `names`, numbered as in `classes`."""
    images, labels = [], []
    for name in names:
        files = _visible(folder / name)
        expect(len(files) > 0, str(folder / name), "at least one image", "an empty folder")
        for path in files:
            expect(not path.is_dir(), str(path), "an image file", "a folder")
            images.append(read_image(path, images[0].shape[:2] if images and size is None else None, size, HINT))
            labels.append((classes or names).index(name))
    if any(image.ndim == 3 for image in images):
        images = [np.stack([image] * 3, -1) if image.ndim == 2 else image for image in images]
    return np.stack(images), np.array(labels, np.int64)


def read_image(path: Path, shape: tuple[int, int] | None, size: int | None = None, hint: str = "") -> np.ndarray:
    """uint8 [H, W] or [H, W, 3], as it is shown: turned as its EXIF says, what is transparent on white.

    shape  that it must have, which is looked at before anything is decoded; `hint`: what to do about another one
    size   scale it (bicubic, antialiased) until its shorter side has so many pixels, and take the middle square
    """
    from PIL import Image, ImageOps

    wanted = f"{shape} pixels as the others"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path) as image:
                held = image.height, image.width
                either = (held, held[::-1])  # it may lie on its side
                expect(shape is None or shape in either, str(path), wanted, f"{held}{hint}")
                expect(image.mode in MODES, str(path), "8 bits per channel", f"mode {image.mode}")
                pixels = _upright(np.asarray(_on_white(image).convert(MODES[image.mode])), image)
                expect(shape in (None, pixels.shape[:2]), str(path), wanted, f"{pixels.shape[:2]}{hint}")
                if size is None:
                    return pixels
                return np.asarray(ImageOps.fit(Image.fromarray(pixels), (size, size), Image.Resampling.BICUBIC))
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise ValueError(f"{path}: expected an image of a plausible size, got a decompression bomb") from None
    except (OSError, SyntaxError, EOFError, zlib.error) as error:
        raise ValueError(f"{path}: expected a whole image file, got a damaged or foreign one ({error})") from None


def _on_white(image):
    """The image itself where nothing in it can be transparent."""
    from PIL import Image

    if not image.has_transparency_data:  # an alpha channel, or a colour that stands for none
        return image
    image = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)


def _upright(pixels: np.ndarray, image) -> np.ndarray:
    """Pixels as `image` stores them, turned and mirrored as it is shown."""
    try:
        turn = image.getexif().get(ORIENTATION)  # after decoding, for formats that Pillow turns by itself
    except Exception:  # damaged EXIF raises whatever its reader stumbles over; such an image is shown as it lies
        return pixels
    pixels = pixels.swapaxes(0, 1) if turn in (5, 6, 7, 8) else pixels
    pixels = pixels[::-1] if turn in (3, 4, 7, 8) else pixels
    return pixels[:, ::-1] if turn in (2, 3, 6, 7) else pixels


def read_unlabelled(
    paths: Sequence[Path], shape: tuple[int, ...], size: int | None = None
) -> tuple[list[str], np.ndarray]:
    """Names and contents [N, *shape] of image files, of all that are in folders, and of .npy arrays [N, *shape].

    shape  [H, W] or [H, W, C] of images, which are made grey or RGB as it says, or [F] of features, from arrays alone
    size   scale image files, and take their middle, as `load_folder` does

    Raises FileNotFoundError or ValueError for what is not there, damaged or of another size.
    """
    names, found = [], []
    for path in paths:
        expect(path.exists(), "images", "files or folders that are there", path, FileNotFoundError)
        if path.suffix == ".npy":
            array = load_npy(path)
            good = array.shape[1:] == shape and array.dtype.kind == ("u" if len(shape) > 1 else "f")
            wanted = f"{'uint8' if len(shape) > 1 else 'floating'} [N, {', '.join(map(str, shape))}]"
            expect(good, str(path), wanted, f"{array.dtype} {list(array.shape)}")
            names += [f"{path}[{i}]" for i in range(len(array))]
            found.append(array)
            continue
        expect(len(shape) > 1, str(path), f"a .npy array [N, {shape[0]}] of features", "another file")
        for file in _inside(path) if path.is_dir() else [path]:
            names.append(str(file))
            found.append(_in_colours(read_image(file, None if size else shape[:2], size), shape)[None])
    expect(len(names) > 0, "images", "at least one image", "none")
    return names, np.concatenate(found)


def _inside(folder: Path) -> list[Path]:
    return [file for path in _visible(folder) for file in (_inside(path) if path.is_dir() else [path])]


def _in_colours(image: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """uint8 [H, W] or [H, W, 3] -> as many channels as in `shape`."""
    channels = (*shape, 1)[2]
    if image.ndim == 3 and channels == 1:
        image = np.floor(image @ LUMINANCE + 0.5).astype(np.uint8)
    if image.ndim == 2 and channels == 3:
        image = np.stack([image] * 3, -1)
    return image.reshape(shape)


def load_arrays(path: Path, table: bool) -> Parts:
    """A .npz file, or a folder of .npy files, with arrays `images`, `features` or `x` and `labels` or `y`, each
    for both parts as train_... and test_..., or for one. `table`: float features [N, F]; else uint8 images.
    """
    expected = ("a .csv file, " if table else "") + "an .npz file or a folder of .npy files"
    expect(path.exists(), "data_dir", expected, path, FileNotFoundError)
    arrays = {file.stem: load_npy(file) for file in path.glob("*.npy")} if path.is_dir() else _read_npz(path)
    found = {}
    for part in ("train_", "test_", ""):
        for kind, names in (("inputs", INPUTS), ("labels", LABELS)):
            name = next((part + name for name in names if part + name in arrays), None)
            if name is not None:
                found[part + kind] = (name, arrays[name])
    train = "train_" if {"train_inputs", "train_labels"} <= found.keys() else ""
    both = bool({"test_inputs", "test_labels"} & found.keys())
    names = (train, "test_") if both else (train,)
    good = all(part + kind in found for part in names for kind in ("inputs", "labels"))
    wanted = "arrays train_images, train_labels, test_images, test_labels, or images and labels"
    held = ", ".join(sorted(arrays)) or "none"
    expect(good, str(path), wanted, held)
    parts = []
    for part in names:
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
    head, rows = _lines(path)
    at = _label_column(head, str(path))
    expect(len(rows) > 0, str(path), "rows of features and a label", "0 rows")
    features = np.empty((len(rows), len(head) - 1), np.float32)
    for i, row in enumerate(rows):
        expect(len(row) == len(head), f"{path}, row {i + 1}", f"{len(head)} values", len(row))
        expect(row[at].strip() != "", f"{path}, row {i + 1}", f"a label as {head[at]!r:.42}", "an empty cell")
        for j, (column, text) in enumerate((c, v) for k, (c, v) in enumerate(zip(head, row, strict=True)) if k != at):
            try:
                value = float(text)
            except ValueError:
                got = f"expected a number as {column!r:.42}, got {text!r:.42}"
                raise ValueError(f"{path}, row {i + 1}: {got}") from None
            finite = abs(value) <= LARGEST
            expect(finite, f"{path}, row {i + 1}", f"a finite {column!r:.42} of float32", f"{text!r:.42}")
            features[i, j] = value
    labels, classes = _labels_of([row[at].strip() for row in rows], str(path), head[at])
    return _parts(features, labels, None, None, classes)


def _lines(path: Path) -> tuple[list[str], list[list[str]]]:
    """The names in a .csv file's first line, and the rows."""
    expected = "a line of names and rows of numbers"
    with open(path, newline="", encoding="utf-8-sig") as file:  # a spreadsheet may have put its mark first
        try:
            lines = [row for row in csv.reader(file) if row]
        except (ValueError, csv.Error) as error:
            raise ValueError(f"{path}: expected {expected}, got {reason_of(error)}") from None
    expect(len(lines) > 0, str(path), expected, "an empty file")
    return [name.strip() for name in lines[0]], lines[1:]


def _label_column(head: list[str], path: str) -> int:
    """Where the label stands. Without one by that name a first line of numbers may be a row, which would be lost."""
    columns = "comma-separated columns of features and a label"
    expect(len(head) >= 2, path, columns, f"one column {head[0]!r:.80}")
    at = [i for i, name in enumerate(head) if name.lower() == "label"]
    expect(len(at) <= 1, path, "one column label", f"{len(at)} of them")
    named = bool(at) or any(name and not _is_number(name) for name in head[:-1])
    expect(named, path, "a first line of names, not of numbers", f"{','.join(head)!r:.80}")
    return at[0] if at else len(head) - 1


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _labels_of(texts: list[str], path: str, column: str) -> tuple[np.ndarray, tuple[str, ...]]:
    """Labels and the classes' names. Whole numbers are labels as they are, other texts are names."""
    if all(text.isdecimal() and len(text) < 10 for text in texts):
        labels = np.array([int(text) for text in texts], np.int64)
        return labels, _numbered(int(labels.max()), len(texts), path)
    classes = tuple(sorted(set(texts)))
    # With more classes than half the rows one has a single row, so nothing is refused that could be trained on.
    numbers = 2 * len(classes) > len(texts) and all(map(_is_number, classes))
    got = f"numbers: {len(classes)} different ones in {len(texts)} rows"
    expect(not numbers, path, f"classes as {column!r:.42}", got)
    return np.array([classes.index(text) for text in texts], np.int64), classes


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
        few = [name for name, count in zip(classes, counts, strict=True) if count < 2]
        expect(not few, "labels", "2 samples or more of every class", f"1 of class {', '.join(few)[:80]}")
        rest, held = stratified(y, TEST_SHARE)
        x, y, test_x, test_y = x[rest], y[rest], x[held], y[held]
    order, test_order = (np.random.default_rng(0).permutation(len(labels)) for labels in (y, test_y))
    return [x[order], y[order], test_x[test_order], test_y[test_order]], classes
