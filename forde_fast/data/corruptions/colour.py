"""Colour, contrast and what files do: float64 [n, H, W, C] in [0, 1], a severity's numbers, generator -> the same
shape; JPEG and pixels of another size on bytes, by Pillow, one image after the other."""

from __future__ import annotations

from collections.abc import Callable
from io import BytesIO
from typing import Any

import numpy as np

LUMINANCE = np.array([0.299, 0.587, 0.114])  # of red, green, blue (ITU-R BT.601)


def grey(x: np.ndarray) -> np.ndarray:
    """[..., C] -> [..., 1]: the luminance of RGB; what is grey stays."""
    return x if x.shape[-1] == 1 else (x @ LUMINANCE)[..., None]


def contrast(x: np.ndarray, factor: float, rng: np.random.Generator) -> np.ndarray:
    mean = x.mean(axis=(1, 2), keepdims=True)
    return (x - mean) * factor + mean


def brightness(x: np.ndarray, added: float, rng: np.random.Generator) -> np.ndarray:
    if x.shape[3] == 1:
        return x + added
    hue, saturation, value = _rgb_to_hsv(x)
    return _hsv_to_rgb(hue, saturation, np.clip(value + added, 0, 1))


def saturate(x: np.ndarray, change: tuple[float, float], rng: np.random.Generator) -> np.ndarray:
    factor, offset = change
    hue, saturation, value = _rgb_to_hsv(x)
    return _hsv_to_rgb(hue, np.clip(saturation * factor + offset, 0, 1), value)


def _rgb_to_hsv(rgb: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """[..., 3] in [0, 1] to hue, saturation, value, each [...] in [0, 1]; hue 0 where there is no colour."""
    red, green, blue = np.moveaxis(rgb, -1, 0)
    value = rgb.max(axis=-1)
    spread = value - rgb.min(axis=-1)
    safe = np.where(spread == 0, 1, spread)
    sextant = np.where(
        blue == value,
        4 + (red - green) / safe,
        np.where(green == value, 2 + (blue - red) / safe, (green - blue) / safe),
    )
    hue = np.where(spread == 0, 0, sextant / 6 % 1)
    return hue, spread / np.where(value == 0, 1, value), value


# In each sixth of the hue circle: which of (value, falling, low, rising) red, green and blue are.
_SEXTANTS = np.array([[0, 3, 2], [1, 0, 2], [2, 0, 3], [2, 1, 0], [3, 2, 0], [0, 2, 1]])


def _hsv_to_rgb(hue: np.ndarray, saturation: np.ndarray, value: np.ndarray) -> np.ndarray:
    """The way back: three [...] in [0, 1] to [..., 3]."""
    sextant = np.floor(hue * 6)
    within = hue * 6 - sextant
    low = value * (1 - saturation)
    falling = value * (1 - within * saturation)
    rising = value * (1 - (1 - within) * saturation)
    pick = _SEXTANTS[sextant.astype(np.intp) % 6]
    return np.choose(pick, [part[..., None] for part in (value, falling, low, rising)])


def jpeg_compression(pixels: np.ndarray, quality: int, rng: np.random.Generator) -> np.ndarray:
    from PIL import Image

    def compress(image: Any) -> Any:
        stream = BytesIO()
        image.save(stream, "JPEG", quality=quality)
        return Image.open(stream)

    return _with_pillow(pixels, compress)


def pixelate(pixels: np.ndarray, share: float, rng: np.random.Generator) -> np.ndarray:
    from PIL import Image

    height, width = pixels.shape[1:3]
    small = max(1, int(width * share)), max(1, int(height * share))
    box = Image.Resampling.BOX
    return _with_pillow(pixels, lambda image: image.resize(small, box).resize((width, height), box))


def _with_pillow(pixels: np.ndarray, change: Callable[[Any], Any]) -> np.ndarray:
    from PIL import Image

    flat = pixels[..., 0] if pixels.shape[3] == 1 else pixels  # Pillow's grey images have no channel axis
    changed = [np.asarray(change(Image.fromarray(np.ascontiguousarray(image)))) for image in flat]
    return np.stack(changed).reshape(pixels.shape)
