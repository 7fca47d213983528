"""Image sets in memory: `load` gives them as stored, `Normalisation` makes of them what a model receives."""

from __future__ import annotations

import gzip
import math
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from forde_fast.data.cifar import ARCHIVES, load_cifar
from forde_fast.data.download import advice, cache
from forde_fast.data.download import download as fetch
from forde_fast.data.own import Parts, load_arrays, load_csv, load_folder
from forde_fast.data.published import TINY_MEAN, TINY_STD, load_svhn, load_tiny_imagenet
from forde_fast.validation import expect, labels_in_range, one_of, reason_of, whole

DATASETS = (
    "fashion-mini", "digits", "fashion-mnist", "cifar10", "cifar100", "tiny-imagenet", "svhn",
    "folder", "npz", "table",
)  # fmt: skip

FASHION_CLASSES = (
    "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
)  # fmt: skip
FASHION_FOLDER = Path("/usr/share/datasets/fashion-mnist")  # Debian's package dataset-fashion-mnist
FASHION_URL = "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/"
# md5 of the compressed files, from the README of zalandoresearch/fashion-mnist. Debian compressed them anew.
FASHION_MD5 = {
    "train-images-idx3-ubyte.gz": "8d4fb7e6c68d591d4c3dfef9ec88bf0d",
    "train-labels-idx1-ubyte.gz": "25c81989df183df01b3e8a0aad5dffbe",
    "t10k-images-idx3-ubyte.gz": "bef4ecab320f06d8554ea6380940ec79",
    "t10k-labels-idx1-ubyte.gz": "bb300cfdad3c16e7a12a480ee83cd310",
}

DIGITS_TEST = 500
MOST_BYTES = 1 << 30  # of one file, unpacked: Fashion-MNIST's largest has 47 MB


@dataclass(frozen=True, eq=False)
class Images:
    """A labelled image set, or a table of features in the images' place, on the CPU.

    train_images, test_images: uint8 [N, H, W] (grey) or [N, H, W, C], or float32 features [N, F]; train_labels,
    test_labels: int64 [N]; classes: the names, one per label; normalisation: the published one, where there is
    one. Raises ValueError where these do not fit each other.
    """

    name: str
    train_images: torch.Tensor
    train_labels: torch.Tensor
    test_images: torch.Tensor
    test_labels: torch.Tensor
    classes: tuple[str, ...]
    normalisation: Normalisation | None = None

    @property
    def table(self) -> bool:
        return self.train_images.ndim == 2

    def __post_init__(self) -> None:
        for part in ("train", "test"):
            images, labels = getattr(self, f"{part}_images"), getattr(self, f"{part}_labels")
            where = f"{self.name}: {part}"
            known = images.dtype == torch.uint8 and images.ndim in (3, 4)
            known |= images.dtype == torch.float32 and images.ndim == 2
            expect(known, f"{where}_images", "uint8 [N, H, W] or [N, H, W, C]", _kind(images))
            good = labels.dtype == torch.int64 and labels.shape == images.shape[:1]
            expect(good, f"{where}_labels", f"int64 [{len(images)}], one per image", _kind(labels))
            labels_in_range(labels, len(self.classes), f"{where}_labels")
        wanted, got = (list(images.shape[1:]) for images in (self.train_images, self.test_images))
        expect(got == wanted, f"{self.name}: test_images", f"the training images' shape {wanted}", got)


def _kind(tensor: torch.Tensor) -> str:
    return f"{tensor.dtype} {list(tensor.shape)}"


def check_image_size(size: int | None, name: str) -> None:
    """What `load` and `TrainConfig` say of an image_size for the set `name`."""
    if size is not None:
        expected = "none, as only images of data = folder are scaled"
        expect(name == "folder", "image_size", expected, f"{size} for {name}")
        whole(size, "image_size")


def load(
    name: str, folder: str | Path | None = None, download: bool = False, image_size: int | None = None
) -> Images:
    """Load an image set by its name.

    - "fashion-mini": the first 2,000 training and 1,000 test images of Fashion-MNIST, shipped here.
    - "digits": scikit-learn's 1,797 images of 8 x 8, as a fixed split into 1,297 and 500 with equal shares of
      each digit; the grey levels 0 to 16 are spread over 0 to 255.
    - "fashion-mnist": 60,000 and 10,000 images of 28 x 28 from the four idx files, compressed or not: in
      `folder` if given, else where Debian's package puts them, else in the cache. `download=True` fetches
      those that are nowhere into `folder` or the cache: $FORDE_FAST_CACHE, ~/.cache/forde_fast if unset.

    - "cifar10", "cifar100": the published archive, or the folder that it holds, in `folder` or in the cache;
      `download=True` as above. Normalised as is usual for them, not as fitted.
    - "tiny-imagenet": the folder tiny-imagenet-200; its validation part is the test part. "svhn": the two .mat
      files of 32 x 32. Both in `folder` or in the cache, where they must have been put.
    - "folder": class folders of images; "npz": arrays of images; "table": features as .csv, .npz or .npy. Where
      they lie is `folder`, which may be a file; `own.py` says how they are laid out. Without a test part of
      their own a stratified fifth of them is one. `image_size`, for "folder" alone: each image is scaled until its
      shorter side has so many pixels, and its middle square is taken; without it all must have one size.

    Raises:
        ValueError: an unknown name; a damaged, truncated or foreign file; a download with another checksum.
        FileNotFoundError: a file that is missing, with what to do about it.
        OSError: a download that fails.
    """
    one_of(name, "name", DATASETS)
    check_image_size(image_size, name)
    match name:
        case "fashion-mini":
            return _load_fashion_mini()
        case "digits":
            return _load_digits()
        case "fashion-mnist":
            return _load_fashion_mnist(None if folder is None else Path(folder), download)
        case "cifar10" | "cifar100":
            arrays, classes = load_cifar(name, None if folder is None else Path(folder), download)
            published = Normalisation(ARCHIVES[name].mean, ARCHIVES[name].std)
            return _images(name, *arrays, classes=classes, normalisation=published)
        case "tiny-imagenet":
            arrays, classes = load_tiny_imagenet(cache() if folder is None else Path(folder))
            return _images(name, *arrays, classes=classes, normalisation=Normalisation(TINY_MEAN, TINY_STD))
        case "svhn":
            arrays, classes = load_svhn(cache() / "svhn" if folder is None else Path(folder))
            return _images(name, *arrays, classes=classes)
    expect(folder is not None, "data_dir", f"the place of the data, for data = {name}", "none")
    arrays, classes = _load_own(name, Path(folder), image_size)
    return _images(str(folder), *arrays, classes=classes)


def _load_own(name: str, path: Path, image_size: int | None) -> Parts:
    if name == "folder":
        return load_folder(path, image_size)
    if name == "table" and path.suffix.lower() == ".csv" and path.is_file():
        return load_csv(path)
    return load_arrays(path, table=name == "table")


def _load_fashion_mini() -> Images:
    parts = ("train_images", "train_labels", "test_images", "test_labels")
    with np.load(Path(__file__).with_name("fashion_mini.npz"), allow_pickle=False) as stored:
        return _images("fashion-mini", *(stored[part] for part in parts), classes=FASHION_CLASSES)


def _load_digits() -> Images:
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = np.rint(digits.images * (255 / 16)).astype(np.uint8)
    labels = digits.target.astype(np.int64)

    # Each image's place within its class, shuffled and scaled to [0, 1): the lowest 500 hold equal shares of
    # all classes. RandomState because its stream, unlike Generator's, is promised never to change.
    random = np.random.RandomState(0)
    place = np.empty(len(labels))
    for label, count in enumerate(np.bincount(labels)):
        place[labels == label] = (random.permutation(count) + 0.5) / count
    by_place = np.argsort(place, kind="stable")
    test, train = np.sort(by_place[:DIGITS_TEST]), np.sort(by_place[DIGITS_TEST:])
    return _images("digits", images[train], labels[train], images[test], labels[test], classes=tuple("0123456789"))


def _load_fashion_mnist(folder: Path | None, download: bool) -> Images:
    places = [FASHION_FOLDER, cache() / "fashion-mnist"] if folder is None else [folder]
    found = {}
    for name in FASHION_MD5:
        paths = [place / file for place in places for file in (name, name.removesuffix(".gz"))]
        found[name] = next((path for path in paths if path.is_file()), None)
    for name, path in found.items():
        if path is None:
            place, files = places[-1] / name, advice("fashion-mnist", "the four files")
            got = f"no such file; {files}, or install Debian's dataset-fashion-mnist"
            expect(download, str(place), "a file that is there", got, FileNotFoundError)
            found[name] = fetch("fashion-mnist", FASHION_URL + name, FASHION_MD5[name], place)

    train_images, train_labels, test_images, test_labels = (
        read_idx(path, dimensions=3 if "images" in name else 1) for name, path in found.items()
    )
    return _images("fashion-mnist", train_images, train_labels, test_images, test_labels, classes=FASHION_CLASSES)


def _images(name: str, *arrays: np.ndarray, classes: tuple[str, ...], normalisation=None) -> Images:
    """Images from (train_images, train_labels, test_images, test_labels) as arrays."""
    train_images, train_labels, test_images, test_labels = (
        torch.from_numpy(np.require(a, requirements=["C", "W"])) for a in arrays
    )
    return Images(name, train_images, train_labels.long(), test_images, test_labels.long(), classes, normalisation)


def read_idx(path: Path, dimensions: int) -> np.ndarray:
    """Read one file in MNIST's idx format, gzipped or not, as a uint8 array of so many dimensions.

    The format: two zero bytes, the type (8 is uint8), the number of dimensions, each dimension as a
    big-endian uint32, the data. Raises ValueError, naming the file, if anything is different, missing or left
    over.
    """
    start = 4 + 4 * dimensions
    try:
        with path.open("rb") as plain:
            packed = plain.read(2) == b"\x1f\x8b"
        with (gzip.open if packed else open)(path, "rb") as file:
            head = file.read(start)
            magic = bytes((0, 0, 8, dimensions))
            expect(head[:4] == magic, str(path), f"an idx file that begins with {magic.hex()}", head[:4].hex())
            shape = tuple(int.from_bytes(head[place : place + 4], "big") for place in range(4, start, 4))
            size = math.prod(shape)
            expect(size <= MOST_BYTES, str(path), f"at most {MOST_BYTES} bytes", f"shape {list(shape)}")
            content = file.read(size + 1)  # no more than announced: a small gzip file may unpack to any size
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ValueError(f"{path}: expected a whole gzip file, got a damaged one ({reason_of(error)})") from None
    got = "more" if len(content) > size else len(head) + len(content)
    expect(got == start + size, str(path), f"{start + size} bytes for shape {list(shape)}", got)
    return np.frombuffer(content, np.uint8).reshape(shape)


@dataclass(frozen=True)
class Normalisation:
    """(pixel / 255 − mean) / std for each channel: from stored bytes to what a model receives. For a table of
    features, (feature − mean) / std for each column.

    mean, std: one number per channel, of pixels in [0, 1], or per column, as `fit` finds them in the training set.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]

    @classmethod
    def fit(cls, images: torch.Tensor) -> Normalisation:
        """Of uint8 images [N, H, W] or [N, H, W, C], or features [N, F]; a constant channel's std is 1."""
        if images.ndim == 2 and images.is_floating_point() and len(images):
            exact = images.double()
            std = exact.std(0, correction=0)
            return cls(tuple(exact.mean(0).tolist()), tuple(torch.where(std > 0, std, 1.0).tolist()))
        pixels = _channels_last(images).flatten(0, 2)  # [N·H·W, C]
        expect(len(pixels) > 0, "images", "at least one pixel", f"shape {list(images.shape)}")
        levels = torch.arange(256, dtype=torch.float64) / 255
        mean, std = [], []
        for channel in pixels.T:  # 256 counts instead of a float copy of the whole set
            share = torch.bincount(channel, minlength=256).double().cpu() / len(pixels)
            mean.append(float(share @ levels))
            deviation = float(share @ (levels - mean[-1]) ** 2) ** 0.5
            std.append(1.0 if share.max() == 1 else deviation)
        return cls(tuple(mean), tuple(std))

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        """uint8 [N, H, W] or [N, H, W, C] -> float32 [N, C, H, W], contiguous, on the same device; features
        [N, F] -> float32 [N, F].

        Raises ValueError for another dtype, shape or number of channels.
        """
        if images.ndim == 2 and images.is_floating_point():
            expect(images.shape[1] == len(self.mean), "features", f"{len(self.mean)} columns", images.shape[1])
            mean, std = (torch.tensor(v, dtype=torch.float64, device=images.device) for v in (self.mean, self.std))
            return ((images.double() - mean) / std).float()
        pixels = _channels_last(images).movedim(3, 1)
        expect(pixels.shape[1] == len(self.mean), "images", f"{len(self.mean)} channels", pixels.shape[1])
        mean, std = (
            torch.tensor(v, dtype=torch.float32, device=images.device)[:, None, None] for v in (self.mean, self.std)
        )
        scaled = (pixels.float() / 255).sub_(mean).div_(std).contiguous()
        # One channel moved from the end keeps a stride of 1, which convolutions take for channels-last: there
        # torch 2.13's backward pass has written beyond its memory in narrow networks. A flat copy has one layout.
        return scaled.flatten().view(scaled.shape)


def _channels_last(images: torch.Tensor) -> torch.Tensor:
    known = images.dtype == torch.uint8 and images.ndim in (3, 4)
    expect(known, "images", "uint8 [N, H, W] or [N, H, W, C]", _kind(images))
    return images if images.ndim == 4 else images[..., None]
