"""Images of another kind than a run was trained on, in its shape: what its uncertainty should be high on."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from forde_fast.data.corruptions.colour import LUMINANCE
from forde_fast.data.datasets import DATASETS, load
from forde_fast.data.download import cache
from forde_fast.data.published import read_svhn
from forde_fast.validation import expect, one_of, whole

UNKNOWN = ("noise", *(name for name in DATASETS if name != "table"))


def load_unknown(
    name: str, shape: tuple[int, ...], folder: str | Path | None = None, count: int | None = None, seed: int = 0
) -> np.ndarray:
    """uint8 [N, *shape], with shape [H, W] or [H, W, C] as a run's images have it.

    name    "noise": each value drawn evenly from 0 to 255, 10,000 images unless `count` says otherwise; or the name
            of an image set that `data.load` knows, such as "svhn" for CIFAR or "digits" for Fashion-MNIST: its test
            images, in grey or RGB and of the size asked for (bilinear; "folder": by `image_size`, the middle)
    folder  where that set lies, as in `data.load`
    count   at most so many, the first

    Raises ValueError or FileNotFoundError as `data.load` does.
    """
    one_of(name, "ood", UNKNOWN)
    if count is not None:
        whole(count, "count")
    if name == "noise":
        return np.random.default_rng(seed).integers(0, 256, (count or 10_000, *shape), np.uint8)
    expect(
        folder is not None or name not in ("folder", "npz"),
        "ood_dir",
        f"the place of the images, for ood = {name}",
        "none",
    )
    try:
        images = _test_images(name, shape, folder)[:count]
    except FileNotFoundError as error:  # of what reads any set, and knows its place as data_dir
        text = "ood_dir:" + str(error).removeprefix("data_dir:") if str(error).startswith("data_dir:") else str(error)
        hint = "" if "--ood-dir" in text else "; --ood-dir names the place of the set"
        raise FileNotFoundError(text + hint) from None
    expect(len(images) > 0, "ood", "at least one test image", "none")
    return _as_shape(images, shape)


def _test_images(name: str, shape: tuple[int, ...], folder: str | Path | None) -> np.ndarray:
    if name == "svhn":  # its test file alone is enough
        return read_svhn(Path(folder or cache() / "svhn") / "test_32x32.mat")[0]
    size = min(shape[:2]) if name == "folder" else None  # photos of any size
    return load(name, folder, image_size=size).test_images.numpy()


def _as_shape(images: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """uint8 [N, h, w] or [N, h, w, c] -> [N, *shape]."""
    from PIL import Image

    height, width, channels = (*shape, 1)[:3]
    if images.ndim == 4 and images.shape[3] == 1:
        images = images[..., 0]
    if images.ndim == 4 and channels == 1:
        images = np.floor(images @ LUMINANCE + 0.5).astype(np.uint8)
    if images.shape[1:3] != (height, width):
        resized = [Image.fromarray(image).resize((width, height), Image.Resampling.BILINEAR) for image in images]
        images = np.stack([np.asarray(image) for image in resized])
    if images.ndim == 3 and channels == 3:
        images = np.stack([images] * 3, -1)
    return images.reshape(len(images), *shape)
