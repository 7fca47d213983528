"""Image sets, their files and downloads, normalisation, and the loader."""

import gzip
import hashlib
import itertools
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from forde_fast.data import DATASETS, Images, Loader, Normalisation, datasets, load
from forde_fast.data.datasets import FASHION_MD5, read_idx

PARTS = ("train_images", "train_labels", "test_images", "test_labels")


def idx(array: np.ndarray) -> bytes:
    """The idx format, written independently of its reader."""
    head = np.array([0x0800 + array.ndim, *array.shape], ">u4").tobytes()
    return head + array.astype(np.uint8).tobytes()


@pytest.fixture
def arrays():
    random = np.random.default_rng(0)
    made = [random.integers(0, 256, (n, 28, 28)) for n in (30, 20)]
    return [made[0], np.arange(30) % 10, made[1], np.arange(20) % 10]


@pytest.fixture
def folder(tmp_path, arrays):
    """A small set in the real one's layout; the last two files are not compressed."""
    for name, array in zip(list(FASHION_MD5)[:2], arrays, strict=False):
        (tmp_path / name).write_bytes(gzip.compress(idx(array), mtime=0))
    for name, array in zip(list(FASHION_MD5)[2:], arrays[2:], strict=True):
        (tmp_path / name.removesuffix(".gz")).write_bytes(idx(array))
    return tmp_path


# Image sets.


def test_fashion_mini_is_what_is_shipped():
    images = load("fashion-mini")
    assert images.train_images.shape == (2000, 28, 28)
    assert images.test_images.shape == (1000, 28, 28)
    assert len(images.classes) == 10
    digest = hashlib.sha256()
    for part in PARTS:
        digest.update(getattr(images, part).numpy().tobytes())
    assert digest.hexdigest() == "1e6bbe69312f2f4ae1c8cee2c3d3df4051c4cc9a5a6133a18b440da747b77cef"
    licence = Path(datasets.__file__).with_name("fashion_mini.LICENSE").read_text()
    assert "MIT" in licence
    assert "Copyright (c) 2017 Zalando SE" in licence


@pytest.mark.skipif(not datasets.FASHION_FOLDER.is_dir(), reason="needs Debian's dataset-fashion-mnist")
def test_fashion_mini_is_the_beginning_of_fashion_mnist():
    mini, whole = load("fashion-mini"), load("fashion-mnist")
    assert whole.train_images.shape == (60000, 28, 28)
    assert whole.test_images.shape == (10000, 28, 28)
    assert mini.classes == whole.classes
    for part in PARTS:
        small = getattr(mini, part)
        assert torch.equal(small, getattr(whole, part)[: len(small)])


def test_digits_split_is_fixed_stratified_and_whole():
    from sklearn.datasets import load_digits

    digits = load("digits")
    assert digits.train_images.shape == (1297, 8, 8)
    assert digits.test_images.shape == (500, 8, 8)
    assert digits.test_images.max() == 255
    share = torch.bincount(digits.test_labels) / torch.bincount(torch.cat([digits.train_labels, digits.test_labels]))
    assert (share - 500 / 1797).abs().max() < 1 / 174  # less than one image of the smallest class
    both = torch.cat([digits.train_images, digits.test_images]).numpy()
    stored = np.rint(load_digits().images * 255 / 16)
    assert sorted(map(bytes, both)) == sorted(map(bytes, stored.astype(np.uint8)))
    assert (
        hashlib.sha256(digits.test_labels.numpy().tobytes()).hexdigest()
        == "fc184557472c3c22dcdb00c7a931740b31048e62eacce4070fc0908ad2467f2d"
    )


def test_fashion_mnist_reads_the_real_layout(folder, arrays):
    images = load("fashion-mnist", folder)
    for part, array in zip(PARTS, arrays, strict=True):
        assert np.array_equal(getattr(images, part).numpy(), array)
    assert images.train_labels.dtype == torch.int64


def test_unknown_name_lists_the_known_ones():
    with pytest.raises(ValueError, match="name: expected one of " + ", ".join(DATASETS) + ", got 'mnist'"):
        load("mnist")


def test_missing_file_says_what_to_do(folder):
    (folder / "train-labels-idx1-ubyte.gz").unlink()
    with pytest.raises(FileNotFoundError, match=r"labels-idx1-ubyte\.gz: expected .*, got no such file; name a"):
        load("fashion-mnist", folder)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "begins with 00000803, got $"),
        (b"GIF89a", "begins with 00000803, got 47494638"),
        (idx(np.zeros(3)), "begins with 00000803, got 00000801"),  # labels where images belong
        (b"\0\0\x0d\x03" + bytes(12), "begins with 00000803, got 00000d03"),  # floats
        (idx(np.zeros((2, 4, 4)))[:10], "got 10$"),  # cut within the header
        (idx(np.zeros((2, 4, 4)))[:-1], r"expected 48 bytes for shape \[2, 4, 4\], got 47"),
        (idx(np.zeros((2, 4, 4))) + b"\0", "expected 48 bytes .* got more"),
        (b"\0\0\x08\x03" + b"\xff" * 12, "expected at most 1073741824 bytes, got shape"),  # overflows 64 bits
        (gzip.compress(idx(np.zeros((2, 4, 4))), mtime=0)[:-5], "expected a whole gzip file"),
        (gzip.compress(idx(np.zeros((2, 4, 4))), mtime=0)[:6] + b"\xff" * 30, "expected a whole gzip file"),
    ],
)
def test_damaged_and_foreign_files_are_refused(tmp_path, content, message):
    path = tmp_path / "some-images"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"some-images: .*{message}"):
        read_idx(path, dimensions=3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"train_labels": torch.tensor([0, 2])},
            "toy: train_labels: expected values from 0 to 1, got values from 0 to 2",
        ),
        (
            {"test_labels": torch.tensor([-1])},
            "toy: test_labels: expected values from 0 to 1, got values from -1 to -1",
        ),
        ({"test_labels": torch.tensor([0, 1])}, r"test_labels: expected int64 \[1\].*got torch\.int64 \[2\]"),
        ({"train_images": torch.zeros(2, 4, 4)}, r"train_images: expected uint8 .*, got torch\.float32"),
        ({"test_images": torch.zeros(1, 4, 5, dtype=torch.uint8)}, r"shape \[4, 4\], got \[4, 5\]"),
    ],
)
def test_images_must_fit_each_other(change, message):
    parts = {
        "train_images": torch.zeros(2, 4, 4, dtype=torch.uint8),
        "train_labels": torch.tensor([0, 1]),
        "test_images": torch.zeros(1, 4, 4, dtype=torch.uint8),
        "test_labels": torch.tensor([1]),
    }
    assert Images(name="toy", classes=("a", "b"), **parts).name == "toy"
    with pytest.raises(ValueError, match=message):
        Images(name="toy", classes=("a", "b"), **(parts | change))


# Downloads: the "server" is a folder.


@pytest.fixture
def server(tmp_path, arrays, monkeypatch):
    store = tmp_path / "server"
    store.mkdir()
    checksums = {}
    for name, array in zip(FASHION_MD5, arrays, strict=True):
        content = gzip.compress(idx(array), mtime=0)
        (store / name).write_bytes(content)
        checksums[name] = hashlib.md5(content).hexdigest()
    monkeypatch.setattr(datasets, "FASHION_URL", store.as_uri() + "/")
    monkeypatch.setattr(datasets, "FASHION_MD5", checksums)
    monkeypatch.setattr(datasets, "FASHION_FOLDER", tmp_path / "nowhere")
    monkeypatch.setenv("FORDE_FAST_CACHE", str(tmp_path / "cache"))
    return store


def test_download_goes_to_the_cache_once(server, tmp_path, arrays):
    with pytest.raises(FileNotFoundError, match="download=True"):
        load("fashion-mnist")
    assert np.array_equal(load("fashion-mnist", download=True).test_images.numpy(), arrays[2])
    cache = tmp_path / "cache" / "fashion-mnist"
    assert sorted(path.name for path in cache.iterdir()) == sorted(FASHION_MD5)
    for path in server.iterdir():
        path.unlink()
    assert len(load("fashion-mnist").train_images) == 30
    assert len(load("fashion-mnist", download=True).train_images) == 30


def test_download_fetches_only_what_a_folder_lacks(server, folder, arrays):
    (folder / "train-labels-idx1-ubyte.gz").unlink()
    for path in server.iterdir():
        if path.name != "train-labels-idx1-ubyte.gz":
            path.unlink()
    assert np.array_equal(load("fashion-mnist", folder, download=True).train_labels.numpy(), arrays[1])


@pytest.mark.parametrize("damage", ["changed", "cut off", "missing"])
def test_bad_download_leaves_nothing_behind(server, tmp_path, damage):
    path = server / "train-images-idx3-ubyte.gz"
    content = path.read_bytes()
    match damage:
        case "changed":
            path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        case "cut off":
            path.write_bytes(content[:-1])
        case "missing":
            path.unlink()
    error, message = (OSError, "train-images") if damage == "missing" else (ValueError, "expected a file with md5")
    with pytest.raises(error, match=message):
        load("fashion-mnist", download=True)
    assert not list((tmp_path / "cache" / "fashion-mnist").iterdir())


def test_published_checksums():
    """Those of the original README; the files that Debian ships are compressed anew and have others."""
    assert datasets.FASHION_URL == "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/"
    assert FASHION_MD5 == {
        "train-images-idx3-ubyte.gz": "8d4fb7e6c68d591d4c3dfef9ec88bf0d",
        "train-labels-idx1-ubyte.gz": "25c81989df183df01b3e8a0aad5dffbe",
        "t10k-images-idx3-ubyte.gz": "bef4ecab320f06d8554ea6380940ec79",
        "t10k-labels-idx1-ubyte.gz": "bb300cfdad3c16e7a12a480ee83cd310",
    }


# Normalisation.


@pytest.mark.parametrize("shape", [(50, 5, 7), (50, 5, 7, 1), (50, 5, 7, 3)])
def test_normalised_training_images_have_mean_0_and_deviation_1(shape):
    images = torch.randint(256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    normalise = Normalisation.fit(images)
    x = normalise(images)
    channels = shape[3] if len(shape) == 4 else 1
    assert x.shape == (50, channels, 5, 7)
    assert x.dtype == torch.float32
    assert x.is_contiguous()
    pixels = x.double().transpose(0, 1).flatten(1)
    torch.testing.assert_close(pixels.mean(1), torch.zeros(channels, dtype=torch.float64), atol=1e-6, rtol=0)
    torch.testing.assert_close(pixels.std(1, correction=0), torch.ones(channels, dtype=torch.float64))
    as_stored = images.reshape(50, 5, 7, channels)[3, 2, 4, -1]
    expected = (float(as_stored) / 255 - normalise.mean[-1]) / normalise.std[-1]
    assert float(x[3, -1, 2, 4]) == pytest.approx(expected, rel=1e-5)


def test_normalised_grey_images_have_the_plain_layout():
    grey = Normalisation.fit(torch.arange(60, dtype=torch.uint8).view(3, 4, 5))
    assert grey(torch.zeros(3, 4, 5, dtype=torch.uint8)).stride() == (20, 20, 5, 1)


def test_published_channel_statistics_are_of_this_kind():
    """mean and std belong to pixels in [0, 1], as CIFAR-10's (0.4914, ...), (0.2470, ...) do."""
    mini = Normalisation.fit(load("fashion-mini").train_images)
    assert mini.mean[0] == pytest.approx(0.286, abs=0.005)  # known of the whole set: 0.2860, 0.3530
    assert mini.std[0] == pytest.approx(0.353, abs=0.005)


def test_constant_channel_stays_finite():
    images = torch.full((4, 3, 3, 3), 7, dtype=torch.uint8)
    images[..., 0] = torch.arange(9, dtype=torch.uint8).reshape(3, 3)
    images[0, 0, 0, 2] = 8  # one grey level in one pixel is a deviation and not a constant
    normalise = Normalisation.fit(images)
    assert normalise.std[1] == 1
    assert normalise.std[2] < 0.01
    x = normalise(images)
    assert x.isfinite().all()
    torch.testing.assert_close(x[:, 1], torch.zeros(4, 3, 3), atol=1e-6, rtol=0)


def test_normalisation_names_what_is_wrong():
    normalise = Normalisation((0.5,), (0.5,))
    with pytest.raises(ValueError, match="images: expected 1 channels, got 3"):
        normalise(torch.zeros(2, 4, 4, 3, dtype=torch.uint8))
    with pytest.raises(ValueError, match=r"images: expected uint8 .*, got torch\.float32 \[2, 4, 4\]"):
        normalise(torch.zeros(2, 4, 4))
    with pytest.raises(ValueError, match="at least one pixel"):
        Normalisation.fit(torch.zeros(0, 4, 4, dtype=torch.uint8))


# Loader. Image n holds 1000 n + its pixel's place, so every value tells where it came from.


def labelled_images(n: int, channels: int = 2, height: int = 5, width: int = 6):
    place = torch.arange(channels * height * width, dtype=torch.float64).reshape(channels, height, width)
    return 1000 * torch.arange(n)[:, None, None, None] + place, torch.arange(n)


@pytest.mark.parametrize("augment", [False, True])
def test_order_and_augmentation_depend_on_seed_and_epoch_alone(augment):
    def epochs(loader, count=2):
        return [torch.cat([x.flatten(1) for x, _ in loader]) for _ in range(count)]

    images, labels = labelled_images(40)
    first = epochs(Loader(images, labels, 8, augment=augment, seed=3))
    assert all(map(torch.equal, first, epochs(Loader(images, labels, 8, augment=augment, seed=3))))
    assert not torch.equal(*first)
    assert not torch.equal(first[0], epochs(Loader(images, labels, 8, augment=augment, seed=4))[0])

    torch.manual_seed(1)  # the global generator plays no part
    resumed = Loader(images, labels, 8, augment=augment, seed=3)
    resumed.epoch = 1
    assert torch.equal(first[1], epochs(resumed, 1)[0])
    assert resumed.epoch == 2

    next(iter(resumed))  # an epoch broken off counts as one
    assert resumed.epoch == 3
    one_by_one = epochs(Loader(images, labels, 1, augment=augment, seed=3), 1)[0]
    assert torch.equal(first[0], one_by_one), "batches change the draws"


@pytest.mark.parametrize(
    ("n", "batch_size", "drop_last", "sizes"),
    [
        (10, 4, True, [4, 4]),
        (10, 4, False, [4, 4, 2]),
        (8, 4, True, [4, 4]),
        (8, 4, False, [4, 4]),
        (3, 128, True, [3]),
        (1, 1, True, [1]),
    ],
)
def test_batches_and_their_number(n, batch_size, drop_last, sizes):
    images, labels = labelled_images(n)
    loader = Loader(images, labels, batch_size, drop_last=drop_last)
    batches = list(loader)
    assert [len(y) for _, y in batches] == sizes
    assert len(loader) == len(sizes)
    x, y = (torch.cat(parts) for parts in zip(*batches, strict=True))
    assert torch.equal(x, images[y]), "images and labels come apart"
    assert len(set(y.tolist())) == sum(sizes)
    for x, y in Loader(images, labels, batch_size, shuffle=False):
        assert torch.equal(y, labels[int(y[0]) : int(y[0]) + len(y)])
        assert torch.equal(x, images[y])


def test_augmentation_is_a_crop_and_a_flip_of_each_image():
    """Against a slow search: of all crops and flips of the padded image, exactly one gives the sample."""
    images, labels = labelled_images(200)
    padding, (_, _, height, width) = 2, images.shape
    border = images.amin(dim=(0, 2, 3))
    seen = set()
    for x, y in Loader(images, labels, 32, augment=True, padding=padding, drop_last=False):
        for sample, label in zip(x, y, strict=True):
            padded = border[:, None, None].repeat(1, height + 2 * padding, width + 2 * padding)
            padded[:, padding : padding + height, padding : padding + width] = images[label]
            found = []
            for top, left in itertools.product(range(2 * padding + 1), repeat=2):
                window = padded[:, top : top + height, left : left + width]
                found += [(top, left, "as it is")] * torch.equal(sample, window)
                found += [(top, left, "flipped")] * torch.equal(sample, window.flip(2))
            assert len(found) == 1
            seen.update(found)
    assert len(seen) == 50, "every place, flipped and not, comes up in 200 draws"


def test_flips_and_places_are_equally_likely():
    n, padding = 20000, 1
    images = torch.zeros(n, 1, 3, 3)
    images[:] = torch.arange(9.0).reshape(3, 3)
    ((x, _),) = Loader(images, torch.zeros(n), n, augment=True, padding=padding)
    kinds, counts = x.flatten(1).unique(dim=0, return_counts=True)
    assert len(kinds) == 18
    expected = n / 18
    assert ((counts - expected).abs() < 5 * expected**0.5).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"images": torch.zeros(4, 3, 3)}, r"images: expected floating \[N, C, H, W\].*\[4, 3, 3\]"),
        ({"images": torch.zeros(4, 1, 3, 3, dtype=torch.uint8)}, r"images: .*got torch\.uint8"),
        ({"images": torch.zeros(0, 1, 3, 3)}, "images: .*not empty"),
        ({"labels": torch.zeros(5)}, r"labels: expected \[4\], one label per image, got \[5\]"),
        ({"labels": torch.zeros(4, device="meta")}, "labels: expected on cpu, with the images, got meta"),
        ({"batch_size": 0}, "batch_size: expected a whole number >= 1, got 0"),
        ({"batch_size": 2.5}, r"batch_size: expected a whole number >= 1, got 2\.5"),
        ({"padding": -1}, "padding: expected a whole number >= 0, got -1"),
        ({"seed": -1}, "seed: expected a whole number >= 0, got -1"),
    ],
)
def test_loader_names_what_is_wrong(change, message):
    arguments = {"images": torch.zeros(4, 1, 3, 3), "labels": torch.zeros(4)}
    with pytest.raises(ValueError, match=message):
        Loader(**(arguments | change))


def test_import_is_light():
    code = "import sys, forde_fast.data; print(sorted({'scipy', 'sklearn', 'PIL'} & set(sys.modules)))"
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert answer.stdout.strip() == "[]"
