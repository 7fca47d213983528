"""Corrupted copies of a test set as files: CIFAR-10-C's arrays, as a folder or as the published .tar, and
Tiny-ImageNet-C's folders of images. They are read in slices, nothing is unpacked, and no file can run code.
"""

from __future__ import annotations

import math
import os
import tarfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path, PurePosixPath

import numpy as np

from forde_fast.data.corruptions import CORRUPTIONS, PRESETS, corrupt
from forde_fast.data.own import read_image
from forde_fast.files import make_folder
from forde_fast.validation import expect, one_of, reason_of, whole

SLICE_BYTES = 4 << 20  # of images that are held at a time
SEVERITIES = (1, 2, 3, 4, 5)

Parts = Iterator[tuple[str, int, np.ndarray, np.ndarray]]


def open_corrupted(
    place: str | Path, shape: tuple[int, ...], classes: Sequence[str]
) -> CorruptedFiles | ClassFolders:
    """The CorruptedFiles or ClassFolders at `place`, for images of `shape` [H, W] or [H, W, C] and named classes.

    Iterating yields (name, severity, images, labels), a severity in as many slices as it takes; `names` are the
    corruptions. Raises FileNotFoundError or ValueError in one line, before anything is read whole.
    """
    place = Path(place)
    arrays = place.is_file() or (place / "labels.npy").is_file() or not any(_roots(place))
    return CorruptedFiles(place, shape, len(classes)) if arrays else ClassFolders(place, shape, classes)


class _Corrupted:
    names: tuple[str, ...]

    def keep(self, names: Sequence[str]) -> None:
        """Go through these corruptions alone."""
        missing = ", ".join(name for name in names if name not in self.names)
        expect(not missing, "corruptions", f"some that the files have ({', '.join(self.names)})", missing)
        self.names = tuple(name for name in self.names if name in names)


class CorruptedFiles(_Corrupted):
    """CIFAR-10-C or CIFAR-100-C: `<corruption>.npy`, uint8 [5 N, 32, 32, 3], severity s at rows (s - 1) N to s N,
    and labels.npy [5 N], in a folder or in the .tar that is published."""

    def __init__(self, folder: str | Path, shape: tuple[int, ...], classes: int):
        """The folder or the .tar; shape [H, W] or [H, W, C] and number of classes of the run's images."""
        place = Path(folder)
        there = place.is_dir() or place.is_file()
        expect(there, "corrupted_dir", "a folder of .npy files, or their .tar", place, FileNotFoundError)
        found = _folder_arrays(place) if place.is_dir() else _tar_arrays(place)
        self.names = tuple(name for name in CORRUPTIONS if name in found)
        expect(bool(self.names), "corrupted_dir", "files such as gaussian_noise.npy", f"none in {place}")
        missing = f"{place / 'labels.npy'}"
        expect("labels" in found, missing, "a file that is there", "none", FileNotFoundError)
        labels = found["labels"]()
        good = len(labels.shape) == 1 and labels.dtype.kind in "iu" and len(labels) > 0 and len(labels) % 5 == 0
        expect(good, labels.name, "whole numbers [5 N]", f"{labels.dtype} {list(labels.shape)}")
        self.labels = labels[:].astype(np.int64)
        self.images = len(self.labels) // 5  # of each corruption and severity
        low, high = int(self.labels.min()), int(self.labels.max())
        expect(0 <= low <= high < classes, labels.name, f"0 to {classes - 1}", f"{low} to {high}")
        self._images, wanted = {name: found[name]() for name in self.names}, [len(labels), *shape]
        for images in self._images.values():
            good = images.dtype == np.uint8 and list(images.shape) == wanted
            expect(good, images.name, f"uint8 {wanted}", f"{images.dtype} {list(images.shape)}")

    def __iter__(self) -> Parts:
        count = self.images
        for name in self.names:
            images = self._images[name]
            step = max(1, SLICE_BYTES // math.prod(images.shape[1:]))
            for severity in SEVERITIES:
                end = severity * count
                for start in range(end - count, end, step):
                    rows = slice(start, min(start + step, end))
                    yield name, severity, images[rows], self.labels[rows]


class _Rows:
    """A .npy file, or one that lies uncompressed within a larger file: rows are read from the disk when asked for,
    into memory of their own, so that no more than they take is held."""

    def __init__(self, path: Path, name: str, start: int = 0, size: int | None = None):
        self.path, self.name = path, name
        with path.open("rb") as file:
            file.seek(start)
            try:
                read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
                self.shape, fortran, self.dtype = read[np.lib.format.read_magic(file)](file)
            except Exception as error:  # a damaged header raises whatever its parser stumbles over
                self._refuse(reason_of(error))
            self.start = file.tell()
            end = os.fstat(file.fileno()).st_size
            end = end if size is None else min(end, start + size)
        if self.dtype.hasobject or fortran or len(self.shape) == 0 or min(self.shape) < 0:
            self._refuse("objects, or not row by row")
        self._row = math.prod(self.shape[1:])
        expected, got = len(self) * self._row * self.dtype.itemsize, end - self.start
        if expected != got:
            self._refuse(f"{got} bytes of data for {expected}")

    def _refuse(self, reason: str):
        raise ValueError(f"{self.name}: expected a whole .npy file of numbers, got another ({reason})") from None

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: slice) -> np.ndarray:
        start, end, _ = rows.indices(len(self))
        count, offset = (end - start) * self._row, self.start + start * self._row * self.dtype.itemsize
        values = np.fromfile(self.path, self.dtype, count, offset=offset)
        expect(len(values) == count, self.name, "a file that stays as long as it was", "a shorter one")
        return values.reshape(end - start, *self.shape[1:])


def _folder_arrays(folder: Path) -> dict[str, Callable[[], _Rows]]:
    paths = {name: folder / f"{name}.npy" for name in (*CORRUPTIONS, "labels")}
    return {name: lambda path=path: _Rows(path, str(path)) for name, path in paths.items() if path.is_file()}


def _tar_arrays(path: Path) -> dict[str, Callable[[], _Rows]]:
    """The same of an uncompressed archive, in which each file lies in one piece. Members elsewhere than in the
    archive's own folder, links and devices are refused."""
    found = {}
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                name = PurePosixPath(member.name)
                inside = not name.is_absolute() and ".." not in name.parts
                expect(inside, str(path), "an archive that stays in its own folder", f"a member {member.name!r}")
                plain = (member.isreg() and not member.issparse()) or member.isdir()
                expect(plain, str(path), "an archive of plain files and folders", f"another, {member.name!r}")
                if member.isreg() and name.suffix == ".npy":
                    expect(name.stem not in found, str(path), f"one {name.name}", "several")
                    where = (f"{path}: {name}", member.offset_data, member.size)
                    found[name.stem] = lambda where=where: _Rows(path, *where)
    except (tarfile.TarError, EOFError, OSError) as error:
        reason = reason_of(error)
        raise ValueError(f"{path}: expected a whole, uncompressed .tar, got another file ({reason})") from None
    return found


class ClassFolders(_Corrupted):
    """Tiny-ImageNet-C: `<corruption>/<1 to 5>/<class>/<image>`, in the folder or one below it, where the archives of
    the standard and of the extra corruptions were unpacked side by side. Grey images become RGB."""

    def __init__(self, folder: str | Path, shape: tuple[int, ...], classes: Sequence[str]):
        """A class's folder is the first word of its name. Folders of other classes are passed over: the first
        release has frost for all of ImageNet's."""
        self.shape, self.labels = shape, {name.split()[0]: label for label, name in enumerate(classes)}
        self._places: dict[str, Path] = {}
        for name, path in _roots(Path(folder)):
            self._places.setdefault(name, path)
        self.names = tuple(name for name in CORRUPTIONS if name in self._places)
        expect(bool(self.names), "corrupted_dir", "folders such as gaussian_noise/1", f"none in {folder}")
        for name, severity in ((name, severity) for name in self.names for severity in SEVERITIES):
            place = self._places[name] / str(severity)
            for own in self.labels:
                expect((place / own).is_dir(), str(place / own), "a folder that is there", "none", FileNotFoundError)
        files = self._files(self.names[0], 1)
        self.images = len(files)  # of each corruption and severity
        self._read(files[0][0])  # the size of one, before any work

    def _files(self, name: str, severity: int) -> list[tuple[Path, int]]:
        place = self._places[name] / str(severity)
        files = []
        for own, label in self.labels.items():
            images = sorted(path for path in (place / own).iterdir() if not path.name.startswith("."))
            expect(bool(images), str(place / own), "at least one image", "an empty folder")
            files += [(path, label) for path in images]
        return files

    def _read(self, path: Path) -> np.ndarray:
        image = read_image(path, self.shape[:2])
        if image.ndim < len(self.shape):
            image = np.stack([image] * 3, -1)
        expect(image.shape == self.shape, str(path), f"an image of shape {list(self.shape)}", list(image.shape))
        return image

    def __iter__(self) -> Parts:
        step = max(1, SLICE_BYTES // math.prod(self.shape))
        for name in self.names:
            for severity in SEVERITIES:
                files = self._files(name, severity)
                for start in range(0, len(files), step):
                    part = files[start : start + step]
                    labels = np.array([label for _, label in part], np.int64)
                    yield name, severity, np.stack([self._read(path) for path, _ in part]), labels


def _roots(folder: Path) -> Iterator[tuple[str, Path]]:
    """Corruptions and where they lie: below the folder, or below one of those in it."""
    if folder.is_dir():
        for place in (folder, *sorted(path for path in folder.iterdir() if path.is_dir())):
            yield from ((name, place / name) for name in CORRUPTIONS if (place / name / "1").is_dir())


def write_corrupted(
    folder: str | Path,
    images: np.ndarray,
    labels: np.ndarray,
    names: Sequence[str] = CORRUPTIONS,
    preset: str = "cifar",
    seed: int = 0,
    done: Callable[[Path], None] = lambda path: None,
) -> None:
    """Write corrupted copies of uint8 images [N, H, W] or [N, H, W, C] and their labels [N] in CIFAR-10-C's layout.

    done  called with each file as it is whole

    Raises ValueError for an unknown name or preset or too large labels, FileExistsError for a corruption that is
    there already or other labels, before any work; OSError where the disk is full. A file has its name only once
    it is whole.
    """
    folder = Path(folder)
    one_of(preset, "preset", PRESETS)
    whole(seed, "seed", 0)
    expect(len(labels) == len(images) > 0, "labels", f"one per image, {len(images)}", len(labels))
    expect(0 <= int(labels.min()) <= int(labels.max()) < 256, "labels", "0 to 255, which fit uint8", "others")
    for name in names:
        one_of(name, "names", CORRUPTIONS)
    for name in names:
        expect(
            not (folder / f"{name}.npy").exists(),
            "out",
            "a folder without it",
            folder / f"{name}.npy",
            FileExistsError,
        )
    path, repeated = folder / "labels.npy", np.tile(labels.astype(np.uint8), 5)
    if path.exists():
        rows = _Rows(path, str(path))
        expect(np.array_equal(rows[:], repeated), "out", "the same labels", path, FileExistsError)
    make_folder(folder)
    _write_npy(path, repeated.shape, [repeated])
    for name in names:
        path = folder / f"{name}.npy"
        made = (corrupt(images, name, severity, seed, preset) for severity in SEVERITIES)
        _write_npy(path, (5 * len(images), *images.shape[1:]), made)
        done(path)


def _write_npy(path: Path, shape: tuple[int, ...], parts) -> None:
    """uint8 rows one part after the other; not through a mapping, where a full disk kills the process."""
    partial = path.with_name(f"{path.name}.part")
    try:
        with partial.open("wb") as file:
            header = {"descr": "|u1", "fortran_order": False, "shape": shape}
            np.lib.format.write_array_header_1_0(file, header)
            for part in parts:
                file.write(np.ascontiguousarray(part).data)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
