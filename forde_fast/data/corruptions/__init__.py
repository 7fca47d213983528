"""The corruptions of CIFAR-10-C, batched: what they do to an image and how hard, from severity 1 to 5.

The recipe is Hendrycks & Dietterich, "Benchmarking Neural Network Robustness to Common Corruptions and
Perturbations" (2019), with the severities of their make_cifar_c.py, not the ImageNet ones, which wreck
32 x 32 images. Images stay uint8 [N, H, W, C]; the arithmetic happens in float64 on values in [0, 1].
Results are cut off to whole grey levels, not rounded: that is what the published sets contain.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from forde_fast.data.corruptions import blur, colour, geometry, noise, weather
from forde_fast.data.corruptions.severities import (
    CIFAR_SEVERITIES,
    CORRUPTIONS,
    EXTRA,
    GREY_SEVERITIES,
    HARDER,
    PRESETS,
    STANDARD,
)
from forde_fast.validation import expect, one_of, whole

__all__ = ["CIFAR_SEVERITIES", "CORRUPTIONS", "EXTRA", "GREY_SEVERITIES", "HARDER", "PRESETS", "STANDARD", "corrupt"]

CHUNK_BYTES = 256 << 10  # of uint8 input per step: fastest of 64 KiB to 4 MiB, and float64 copies stay small


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
    one_of(name, "name", CORRUPTIONS)
    one_of(preset, "preset", PRESETS)
    expect(severity in (1, 2, 3, 4, 5), "severity", "an integer from 1 to 5", repr(severity))
    whole(seed, "seed", least=0)
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
    known = isinstance(images, (np.ndarray, torch.Tensor))
    expect(known, "images", "a numpy array or a torch tensor", type(images).__name__, TypeError)
    expect(str(images.dtype) in ("uint8", "torch.uint8"), "images", "uint8", images.dtype, TypeError)
    good = images.ndim == 3 or (images.ndim == 4 and images.shape[3] in (1, 3))
    good &= 0 not in images.shape[1:]
    expect(good, "images", "[N, H, W] or [N, H, W, C] with C 1 or 3", list(images.shape))


def _on_unit_interval(change: Callable) -> Callable:
    def on_bytes(pixels: np.ndarray, level: Any, rng: np.random.Generator) -> np.ndarray:
        return (np.clip(change(pixels / 255.0, level, rng), 0, 1) * 255).astype(np.uint8)

    return on_bytes


def _colour_only(change: Callable) -> Callable:
    """Leave grey images as they are, to the byte."""
    return lambda pixels, level, rng: pixels if pixels.shape[3] == 1 else change(pixels, level, rng)


# uint8 [n, H, W, C], the severity's parameters, generator -> uint8 [n, H, W, C]
_BY_NAME: dict[str, Callable[[np.ndarray, Any, np.random.Generator], np.ndarray]] = {
    "gaussian_noise": _on_unit_interval(noise.gaussian_noise),
    "shot_noise": _on_unit_interval(noise.shot_noise),
    "impulse_noise": _on_unit_interval(noise.impulse_noise),
    "defocus_blur": _on_unit_interval(blur.defocus_blur),
    "glass_blur": _on_unit_interval(blur.glass_blur),
    "motion_blur": _on_unit_interval(blur.motion_blur),
    "zoom_blur": _on_unit_interval(blur.zoom_blur),
    "snow": _on_unit_interval(weather.snow),
    "frost": weather.frost,
    "fog": _on_unit_interval(weather.fog),
    "brightness": _on_unit_interval(colour.brightness),
    "contrast": _on_unit_interval(colour.contrast),
    "elastic_transform": _on_unit_interval(geometry.elastic_transform),
    "pixelate": colour.pixelate,
    "jpeg_compression": colour.jpeg_compression,
    "gaussian_blur": _on_unit_interval(blur.gaussian_blur),
    "saturate": _colour_only(_on_unit_interval(colour.saturate)),
    "spatter": _on_unit_interval(weather.spatter),
    "speckle_noise": _on_unit_interval(noise.speckle_noise),
}
