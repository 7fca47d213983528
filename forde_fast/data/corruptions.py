"""The corruptions of CIFAR-10-C, batched: what they do to an image and how hard, from severity 1 to 5.

The recipe is Hendrycks & Dietterich, "Benchmarking Neural Network Robustness to Common Corruptions and
Perturbations" (2019), with the severities of their make_cifar_c.py, not the ImageNet ones, which wreck
32 x 32 images. Images stay uint8 [N, H, W, C]; the arithmetic happens in float64 on values in [0, 1].
Results are cut off to whole grey levels, not rounded: that is what the published sets contain.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from io import BytesIO
from typing import Any

import numpy as np
import torch

CHUNK_BYTES = 256 << 10  # of uint8 input per step: fastest of 64 KiB to 4 MiB, and float64 copies stay small

# One entry per severity; severities that the published recipe writes as tuples stay tuples.
CIFAR_SEVERITIES: dict[str, tuple] = {
    "gaussian_noise": (0.04, 0.06, 0.08, 0.09, 0.10),  # standard deviation
    "shot_noise": (500, 250, 100, 75, 50),  # photons per pixel at full brightness
    "impulse_noise": (0.01, 0.02, 0.03, 0.05, 0.07),  # share of values lost
    "speckle_noise": (0.06, 0.1, 0.12, 0.16, 0.2),  # standard deviation, relative to the value
    "gaussian_blur": (0.4, 0.6, 0.7, 0.8, 1),  # standard deviation in pixels
    "defocus_blur": ((0.3, 0.4), (0.4, 0.5), (0.5, 0.6), (1, 0.2), (1.5, 0.1)),  # disk radius, its smoothing
    "zoom_blur": (1.06, 1.11, 1.16, 1.21, 1.26),  # largest zoom, exclusive
    "contrast": (0.75, 0.5, 0.4, 0.3, 0.15),  # what is left of the distance to the mean
    "brightness": (0.05, 0.1, 0.15, 0.2, 0.3),  # added to the value of HSV
    "saturate": ((0.3, 0), (0.1, 0), (1.5, 0), (2, 0.1), (2.5, 0.2)),  # factor and offset of HSV's saturation
    "jpeg_compression": (80, 65, 58, 50, 40),  # quality
    "pixelate": (0.95, 0.9, 0.85, 0.75, 0.65),  # width over the original's
}

# CIFAR-10-C's noise, blur and pixelate hardly touch high-contrast grey images such as Fashion-MNIST's.
GREY_SEVERITIES: dict[str, tuple] = CIFAR_SEVERITIES | {
    "gaussian_noise": (0.1, 0.2, 0.3, 0.4, 0.5),
    "shot_noise": (60, 25, 12, 5, 3),
    "gaussian_blur": (0.75, 1.3125, 1.875, 2.4375, 3.0),
    "pixelate": (0.61, 0.52, 0.43, 0.34, 0.25),  # 28 pixels to 17, 14, 12, 9, 7; 16 would hurt more than 14
}

PRESETS = {"cifar": CIFAR_SEVERITIES, "grey": GREY_SEVERITIES}
CORRUPTIONS = tuple(CIFAR_SEVERITIES)


def corrupt(
    images: np.ndarray | torch.Tensor, name: str, severity: int, seed: int = 0, preset: str = "cifar"
) -> np.ndarray | torch.Tensor:
    """Corrupt images; the result has their type, shape and device, the input is left alone.

    The random corruptions draw from a generator seeded by (seed, name, severity), image after image: with
    one version of numpy the same arguments give the same bytes, and the first k images of a set get the bytes
    that those k get alone.

    Args:
        images: uint8 [N, H, W] or [N, H, W, C] with C 1 (grey) or 3 (RGB), an array or a tensor.
        name: one of CORRUPTIONS. "saturate" acts on colour only: grey images come back unchanged.
        severity: 1 (mild) to 5 (strong).
        seed: a non-negative integer.
        preset: "cifar" has CIFAR-10-C's severities. "grey" is harder where those hardly touch grey images
            (gaussian_noise, shot_noise, gaussian_blur, pixelate) and the same elsewhere.

    Raises:
        TypeError: images that are neither an array nor a tensor, or not uint8.
        ValueError: another shape, an unknown name or preset, a severity outside 1 to 5, a negative seed.
    """
    if name not in CORRUPTIONS:
        raise ValueError(f"name: expected one of {', '.join(CORRUPTIONS)}; got {name!r}")
    if preset not in PRESETS:
        raise ValueError(f"preset: expected one of {', '.join(PRESETS)}; got {preset!r}")
    if severity not in (1, 2, 3, 4, 5):
        raise ValueError(f"severity: expected an integer from 1 to 5; got {severity!r}")
    if seed < 0:
        raise ValueError(f"seed: expected a non-negative integer; got {seed!r}")

    _check_images(images)

    if isinstance(images, torch.Tensor):
        corrupted = corrupt(images.detach().cpu().numpy(), name, severity, seed, preset)
        return torch.from_numpy(corrupted).to(images.device)

    level = PRESETS[preset][name][int(severity) - 1]
    # crc32 and not the place in the table: a corruption added later must not change the others' noise.
    rng = np.random.default_rng([seed, zlib.crc32(name.encode()), int(severity)])

    pixels = images if images.ndim == 4 else images[..., None]  # [N, H, W, C]
    result = np.empty_like(pixels, order="C")
    chunk = max(1, CHUNK_BYTES // max(1, pixels[:1].size))
    for start in range(0, len(pixels), chunk):
        part = slice(start, start + chunk)
        result[part] = _BY_NAME[name](pixels[part], level, rng)
    return result.reshape(images.shape)


def _check_images(images: np.ndarray | torch.Tensor) -> None:
    if not isinstance(images, (np.ndarray, torch.Tensor)):
        raise TypeError(f"images: expected a numpy array or a torch tensor; got {type(images).__name__}")
    if str(images.dtype) not in ("uint8", "torch.uint8"):
        raise TypeError(f"images: expected uint8; got {images.dtype}")
    if images.ndim not in (3, 4) or (images.ndim == 4 and images.shape[3] not in (1, 3)):
        raise ValueError(f"images: expected [N, H, W] or [N, H, W, C] with C 1 or 3; got {list(images.shape)}")


# Noise. x is float64 [n, H, W, C] in [0, 1] from here on; _on_unit_interval wraps what works on it.


def _gaussian_noise(x: np.ndarray, deviation: float, rng: np.random.Generator) -> np.ndarray:
    return x + rng.normal(scale=deviation, size=x.shape)


def _shot_noise(x: np.ndarray, photons: float, rng: np.random.Generator) -> np.ndarray:
    return rng.poisson(x * photons) / photons


def _impulse_noise(x: np.ndarray, share: float, rng: np.random.Generator) -> np.ndarray:
    """Salt and pepper in equal parts, on each channel by itself."""
    draw = rng.random(x.shape)
    return np.where(draw < share / 2, 0.0, np.where(draw < share, 1.0, x))


def _speckle_noise(x: np.ndarray, deviation: float, rng: np.random.Generator) -> np.ndarray:
    return x + x * rng.normal(scale=deviation, size=x.shape)


# Blur.


def _gaussian_blur(x: np.ndarray, deviation: float, rng: np.random.Generator) -> np.ndarray:
    from scipy.ndimage import gaussian_filter

    return gaussian_filter(x, (0, deviation, deviation, 0), mode="nearest", truncate=4.0)


def _defocus_blur(x: np.ndarray, disk: tuple[float, float], rng: np.random.Generator) -> np.ndarray:
    from scipy.ndimage import correlate

    return correlate(x, _disk(*disk)[None, :, :, None], mode="mirror")


def _disk(radius: float, smoothing: float) -> np.ndarray:
    """A disk of ones, smoothed by a 3 x 3 Gaussian, of sum 1: [2r + 3, 2r + 3] with r = floor(radius)."""
    from scipy.ndimage import correlate1d

    reach = int(radius) + 1
    squares = np.arange(-reach, reach + 1) ** 2
    disk = (squares[:, None] + squares[None, :] <= radius**2).astype(np.float32)
    disk /= disk.sum()
    taps = np.exp(-0.5 * np.array([-1, 0, 1]) ** 2 / smoothing**2)
    taps = (taps / taps.sum()).astype(np.float32)  # float32 as in the recipe: a grey level can hang on it
    for axis in (0, 1):
        disk = correlate1d(disk, taps, axis=axis, mode="constant")
    return disk.astype(np.float64)


def _zoom_blur(x: np.ndarray, largest: float, rng: np.random.Generator) -> np.ndarray:
    """The mean of the image and its zooms by 1, 1.01, ... (so the image itself counts twice)."""
    from scipy.sparse import csr_array, kron

    n, height, width, channels = x.shape
    clean = x.transpose(1, 2, 0, 3).reshape(height * width, n * channels)
    # Zooms and their sum in float32, as in the recipe: in float64 some pixels come out one grey level off.
    total = np.zeros(clean.shape, np.float32)
    exact = clean.astype(np.float32).astype(np.float64)
    factors = np.arange(1, largest, 0.01)
    for factor in factors:
        zoom = kron(csr_array(_zoom_matrix(height, factor)), csr_array(_zoom_matrix(width, factor)), "csr")
        total += (zoom @ exact).astype(np.float32)
    mean = (exact.astype(np.float32) + total) / np.float32(len(factors) + 1)
    return mean.reshape(height, width, n, channels).transpose(2, 0, 1, 3)


def _zoom_matrix(size: int, factor: float) -> np.ndarray:
    """Linear interpolation along one axis: zooms the middle and keeps the length. float64 [size, size]."""
    from scipy.ndimage import zoom

    window = int(np.ceil(size / factor))
    start = (size - window) // 2
    zoomed = zoom(np.eye(size)[start : start + window], (factor, 1), order=1)
    trim = (len(zoomed) - size) // 2
    return zoomed[trim : trim + size]


# Colour and contrast.


def _contrast(x: np.ndarray, factor: float, rng: np.random.Generator) -> np.ndarray:
    mean = x.mean(axis=(1, 2), keepdims=True)
    return (x - mean) * factor + mean


def _brightness(x: np.ndarray, added: float, rng: np.random.Generator) -> np.ndarray:
    if x.shape[3] == 1:
        return x + added
    hue, saturation, value = _rgb_to_hsv(x)
    return _hsv_to_rgb(hue, saturation, np.clip(value + added, 0, 1))


def _saturate(x: np.ndarray, change: tuple[float, float], rng: np.random.Generator) -> np.ndarray:
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


# Digital: Pillow, one image after the other, on bytes.


def _jpeg_compression(pixels: np.ndarray, quality: int, rng: np.random.Generator) -> np.ndarray:
    from PIL import Image

    def compress(image: Any) -> Any:
        stream = BytesIO()
        image.save(stream, "JPEG", quality=quality)
        return Image.open(stream)

    return _with_pillow(pixels, compress)


def _pixelate(pixels: np.ndarray, share: float, rng: np.random.Generator) -> np.ndarray:
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


def _on_unit_interval(change: Callable) -> Callable:
    def on_bytes(pixels: np.ndarray, level: Any, rng: np.random.Generator) -> np.ndarray:
        return (np.clip(change(pixels / 255.0, level, rng), 0, 1) * 255).astype(np.uint8)

    return on_bytes


def _colour_only(change: Callable) -> Callable:
    """Leave grey images as they are, to the byte."""
    return lambda pixels, level, rng: pixels if pixels.shape[3] == 1 else change(pixels, level, rng)


# uint8 [n, H, W, C], the severity's parameters, generator -> uint8 [n, H, W, C]
_BY_NAME: dict[str, Callable[[np.ndarray, Any, np.random.Generator], np.ndarray]] = {
    "gaussian_noise": _on_unit_interval(_gaussian_noise),
    "shot_noise": _on_unit_interval(_shot_noise),
    "impulse_noise": _on_unit_interval(_impulse_noise),
    "speckle_noise": _on_unit_interval(_speckle_noise),
    "gaussian_blur": _on_unit_interval(_gaussian_blur),
    "defocus_blur": _on_unit_interval(_defocus_blur),
    "zoom_blur": _on_unit_interval(_zoom_blur),
    "contrast": _on_unit_interval(_contrast),
    "brightness": _on_unit_interval(_brightness),
    "saturate": _colour_only(_on_unit_interval(_saturate)),
    "jpeg_compression": _jpeg_compression,
    "pixelate": _pixelate,
}
