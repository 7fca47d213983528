"""Blurs: float64 [n, H, W, C] in [0, 1], a severity's numbers, generator -> the same shape."""

import numpy as np


def gaussian_blur(x: np.ndarray, deviation: float, rng: np.random.Generator) -> np.ndarray:
    from scipy.ndimage import gaussian_filter

    return gaussian_filter(x, (0, deviation, deviation, 0), mode="nearest", truncate=4.0)


def defocus_blur(x: np.ndarray, disk: tuple[float, float], rng: np.random.Generator) -> np.ndarray:
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


def glass_blur(x: np.ndarray, level: tuple[float, int], rng: np.random.Generator) -> np.ndarray:
    """Blur, take each pixel from its own place, the one to the left, above, or left above; blur again.

    The recipe means to swap pixels, from the last to the first. Its swap copies one over the other instead (NumPy
    views), and that is what the published sets contain: a pixel is read before it is written, so that a round is
    one gather. The first two rows and columns stay.
    """
    deviation, rounds = level
    n, height, width, _ = x.shape
    back = rng.random((n, rounds, 2, height, width)) < 0.5
    x = (gaussian_blur(x, deviation, rng) * 255).astype(np.uint8)
    inner = (np.arange(height)[:, None] >= 2) & (np.arange(width) >= 2)
    image = np.arange(n)[:, None, None]
    for shift in -(back & inner).astype(int).swapaxes(0, 1):  # [n, 2, H, W]
        x = x[image, np.arange(height)[:, None] + shift[:, 0], np.arange(width) + shift[:, 1]]
    return gaussian_blur(x / 255.0, deviation, rng)


def motion_blur(x: np.ndarray, level: tuple[int, float], rng: np.random.Generator) -> np.ndarray:
    angles = rng.uniform(-45, 45, size=len(x))
    return smear(x, *level, angles)


def smear(x: np.ndarray, radius: int, deviation: float, angles: np.ndarray) -> np.ndarray:
    """Half a Gaussian along a line at an angle [n] in degrees, pixels beyond the border being those on it.

    ImageMagick's motion blur: 2 radius + 1 taps at whole pixels. The result has whole grey levels.
    """
    _, height, width, _ = x.shape
    along = np.arange(2 * radius + 1)
    taps = np.exp(-0.5 * (along / deviation) ** 2)
    taps /= taps.sum()
    radians = np.deg2rad(angles)[:, None]
    right = np.ceil(along * np.cos(radians) - 0.5).astype(int) + 2 * radius  # [n, taps], places in `wide`
    down = np.ceil(along * np.sin(radians) - 0.5).astype(int) + 2 * radius
    reach = (2 * radius, 2 * radius)
    wide = np.pad(x, ((0, 0), reach, reach, (0, 0)), mode="edge")
    result = np.zeros_like(x)
    for image, smeared, rows, columns in zip(wide, result, down.tolist(), right.tolist(), strict=True):
        for tap, row, column in zip(taps.tolist(), rows, columns, strict=True):
            smeared += tap * image[row : row + height, column : column + width]
    return np.floor(np.floor(result * 65535 + 0.5) / 257) / 255  # 16 bits inside, the recipe's file has 8


def zoom_blur(x: np.ndarray, largest: float, rng: np.random.Generator) -> np.ndarray:
    """The mean of the image and its zooms by 1, 1.01, ... (so the image itself counts twice)."""
    from scipy.sparse import csr_array, kron

    n, height, width, channels = x.shape
    clean = x.transpose(1, 2, 0, 3).reshape(height * width, n * channels)
    # Zooms and their sum in float32, as in the recipe: in float64 some pixels come out one grey level off.
    total = np.zeros(clean.shape, np.float32)
    exact = clean.astype(np.float32).astype(np.float64)
    factors = np.arange(1, largest, 0.01)
    for factor in factors:
        zoom = kron(csr_array(zoom_matrix(height, factor)), csr_array(zoom_matrix(width, factor)), "csr")
        total += (zoom @ exact).astype(np.float32)
    mean = (exact.astype(np.float32) + total) / np.float32(len(factors) + 1)
    return mean.reshape(height, width, n, channels).transpose(2, 0, 1, 3)


def zoom_matrix(size: int, factor: float) -> np.ndarray:
    """Linear interpolation along one axis: zooms the middle and keeps the length. float64 [size, size]."""
    from scipy.ndimage import zoom

    window = int(np.ceil(size / factor))
    start = (size - window) // 2
    zoomed = zoom(np.eye(size)[start : start + window], (factor, 1), order=1)
    trim = (len(zoomed) - size) // 2
    return zoomed[trim : trim + size]
