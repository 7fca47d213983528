"""Noise on each value: float64 [n, H, W, C] in [0, 1], a severity's numbers, generator -> the same shape."""

import numpy as np


def gaussian_noise(x: np.ndarray, deviation: float, rng: np.random.Generator) -> np.ndarray:
    return x + rng.normal(scale=deviation, size=x.shape)


def shot_noise(x: np.ndarray, photons: float, rng: np.random.Generator) -> np.ndarray:
    return rng.poisson(x * photons) / photons


def impulse_noise(x: np.ndarray, share: float, rng: np.random.Generator) -> np.ndarray:
    """Salt and pepper in equal parts, on each channel by itself."""
    draw = rng.random(x.shape)
    return np.where(draw < share / 2, 0.0, np.where(draw < share, 1.0, x))


def speckle_noise(x: np.ndarray, deviation: float, rng: np.random.Generator) -> np.ndarray:
    return x + x * rng.normal(scale=deviation, size=x.shape)
