"""The elastic transform: float64 [n, H, W, C] in [0, 1], a severity's numbers, generator -> the same shape."""

import numpy as np


def elastic_transform(x: np.ndarray, level: tuple[float, float, float], rng: np.random.Generator) -> np.ndarray:
    """Shift three corners at random and the rest of the image with them, then each pixel by a smooth random field."""
    from scipy.ndimage import gaussian_filter

    n, height, width, _ = x.shape
    size = min(height, width)
    displacement, smoothing, shift = (size * number for number in level)
    draws = rng.uniform(-1, 1, (n, 6 + 2 * height * width))

    centre, reach = np.array([width, height]) // 2, max(1, size // 3)
    corners = centre + reach * np.array([[1, 1], [1, -1], [-1, -1]])  # [3, 2], x and y
    shifted = corners + shift * draws[:, :6].reshape(n, 3, 2)
    back = np.linalg.solve(np.pad(shifted, ((0, 0), (0, 0), (0, 1)), constant_values=1), corners)  # [n, 3, 2]
    rows, columns = np.mgrid[:height, :width]
    there = np.stack([columns, rows, np.ones_like(rows)], -1) @ back[:, None]  # [n, H, W, 2]
    there = np.floor(there * 32 + 0.5) / 32  # the warp that made the published sets knew no finer places
    x = _at(x, there[..., 1], there[..., 0], "mirror")

    fields = displacement * gaussian_filter(
        draws[:, 6:].reshape(n, 2, height, width), (0, 0, smoothing, smoothing), mode="reflect", truncate=3.0
    )
    return _at(x, rows + fields[:, 1], columns + fields[:, 0], "reflect")


def _at(x: np.ndarray, rows: np.ndarray, columns: np.ndarray, mode: str) -> np.ndarray:
    """x [n, H, W, C] at places [n, H, W] between its pixels, linearly."""
    from scipy.ndimage import map_coordinates

    images = np.broadcast_to(np.arange(len(x))[:, None, None], rows.shape)
    places = np.stack([images, rows, columns])
    return np.stack([map_coordinates(channel, places, order=1, mode=mode) for channel in np.moveaxis(x, 3, 0)], 3)
