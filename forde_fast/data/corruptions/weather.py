"""Snow, fog, spatter: float64 [n, H, W, C] in [0, 1], a severity's numbers, generator -> the same shape; frost on
bytes."""

from __future__ import annotations

import functools
from importlib import resources

import numpy as np

from forde_fast.data.corruptions.blur import smear, zoom_matrix
from forde_fast.data.corruptions.colour import grey

# The recipe draws from the first five of six files, of which the second and the third are the same picture.
TEXTURES = ("frost1.jpg", "frost2.jpg", "frost2.jpg", "frost3.jpg", "frost4.jpg")
TEXTURE_STEP = 5  # the recipe shrinks them to a fifth, which without smoothing is every fifth pixel
WATER, MUD = np.array([175, 238, 238]) / 255, np.array([63, 42, 20]) / 255


def snow(x: np.ndarray, level: tuple, rng: np.random.Generator) -> np.ndarray:
    from scipy.special import ndtr

    mean, deviation, zoom, threshold, radius, blur, share = level
    n, height, width, _ = x.shape
    draws = rng.normal(size=(n, height * width + 1))
    flakes = mean + deviation * draws[:, 1:].reshape(n, height, width)
    flakes = zoom_matrix(height, zoom) @ flakes @ zoom_matrix(width, zoom).T
    flakes = np.where(flakes < threshold, 0, flakes).clip(0, 1)
    flakes = np.floor(flakes * 255)[..., None] / 255
    flakes = smear(flakes, radius, blur, angles=-135 + 90 * ndtr(draws[:, 0]))
    whiter = np.maximum(x, grey(x) * 1.5 + 0.5)
    return share * x + (1 - share) * whiter + flakes + flakes[:, ::-1, ::-1]


def frost(pixels: np.ndarray, weights: tuple[float, float], rng: np.random.Generator) -> np.ndarray:
    """A window of a photograph of ice over each image."""
    n, height, width, channels = pixels.shape
    textures = _textures(height, width)
    windows = np.empty((n, height, width, 3))
    for window, draw in zip(windows, rng.random((n, 3)), strict=True):
        texture = textures[int(draw[0] * len(textures))]
        spare = np.array(texture.shape[:2]) - (height, width)
        top, left = (draw[1:] * np.maximum(spare, 1)).astype(int)
        window[:] = texture[top : top + height, left : left + width]
    ice = windows if channels == 3 else grey(windows)
    return (weights[0] * pixels + weights[1] * ice).clip(0, 255).astype(np.uint8)


def texture_folder():
    """Where the package that frost takes its textures from keeps them. Raises ValueError without it."""
    try:
        return resources.files("torch_uncertainty_assets.frost")
    except ModuleNotFoundError:
        wanted = "the package with its textures, from pip install torch-uncertainty-assets"
        raise ValueError(f"frost: expected {wanted}, got none installed") from None


@functools.lru_cache(maxsize=4)
def _textures(height: int, width: int) -> list[np.ndarray]:
    """uint8 [h, w, 3], each at least height x width: every fifth pixel, or more of them, mirrored if need be."""
    from PIL import Image

    folder, textures = texture_folder(), []
    for name in TEXTURES:
        with folder.joinpath(name).open("rb") as file, Image.open(file) as image:
            whole = np.asarray(image.convert("RGB"))
        tall, wide = whole.shape[:2]
        step = max(1, min(TEXTURE_STEP, tall // (height + 1), wide // (width + 1)))
        texture = whole[step // 2 :: step, step // 2 :: step]
        lacking = [(0, max(0, need - have)) for need, have in zip((height, width), texture.shape[:2], strict=True)]
        textures.append(np.pad(texture, (*lacking, (0, 0)), mode="symmetric"))
    return textures


def fog(x: np.ndarray, level: tuple[float, float], rng: np.random.Generator) -> np.ndarray:
    amount, decay = level
    n, height, width, _ = x.shape
    size = 1 << max(1, (max(height, width) - 1).bit_length())  # the power of two that holds the image
    mist = _plasma(rng.uniform(-1, 1, (n, size**2 - 1)), size, decay)[:, :height, :width, None]
    brightest = x.max(axis=(1, 2, 3), keepdims=True)
    return (x + amount * mist) * brightest / (brightest + amount)


def _plasma(draws: np.ndarray, size: int, decay: float) -> np.ndarray:
    """Height maps [n, size, size] from 0 to 1 by the diamond-square algorithm on a torus.

    draws [n, size² - 1] from -1 to 1, which are used up from the coarsest step to the finest.
    """
    n = len(draws)
    heights = np.zeros((n, size, size))
    wobble, used, step = 100.0, 0, size

    def between(total: np.ndarray) -> np.ndarray:
        nonlocal used
        count = total[0].size
        drawn = draws[:, used : used + count].reshape(total.shape)
        used += count
        return total / 4 + wobble**2 * drawn  # squared in the recipe

    while step >= 2:
        half = step // 2
        corners = heights[:, ::step, ::step]
        pairs = corners + np.roll(corners, -1, axis=1)
        middles = between(pairs + np.roll(pairs, -1, axis=2))
        heights[:, half::step, half::step] = middles
        across = corners + np.roll(corners, -1, axis=2) + middles + np.roll(middles, 1, axis=1)
        heights[:, ::step, half::step] = between(across)
        down = corners + np.roll(corners, -1, axis=1) + middles + np.roll(middles, 1, axis=2)
        heights[:, half::step, ::step] = between(down)
        step, wobble = half, wobble / decay

    heights -= heights.min(axis=(1, 2), keepdims=True)
    return heights / heights.max(axis=(1, 2), keepdims=True)


def spatter(x: np.ndarray, level: tuple, rng: np.random.Generator) -> np.ndarray:
    """Drops of water, or splashes of mud."""
    from scipy.ndimage import gaussian_filter

    mean, deviation, smoothing, threshold, strength, mud = level

    def smooth(layer: np.ndarray, by: float) -> np.ndarray:
        return gaussian_filter(layer, (0, by, by), mode="nearest", truncate=4.0)

    liquid = smooth(rng.normal(mean, deviation, x.shape[:3]), smoothing)
    if mud:
        cover = smooth((liquid > threshold).astype(float), strength)
        cover = np.where(cover < 0.8, 0, cover)[..., None]
        return x * (1 - cover) + cover * _shade(MUD, x)
    drops = np.floor(np.where(liquid < threshold, 0, liquid).clip(0, 1) * 255)
    water = drops * _shine(drops)
    most = water.max(axis=(1, 2), keepdims=True)
    water = (water / np.where(most == 0, 1, most))[..., None]
    return x + strength * water * _shade(WATER, x)


def _shade(colour: np.ndarray, x: np.ndarray) -> np.ndarray:
    return colour if x.shape[3] == 3 else grey(colour)


def _shine(drops: np.ndarray) -> np.ndarray:
    """How much of the light each pixel [n, H, W] of drops (grey levels) sends back: an embossed map of the distance
    to the nearest edge. Whole grey levels [n, H, W]."""
    from scipy.ndimage import correlate, distance_transform_edt, uniform_filter

    far = 1e6  # between images, so that each keeps to its own edges
    distance = distance_transform_edt(~_edges(drops), sampling=(far, 1, 1)).clip(max=20)
    distance = np.floor(uniform_filter(distance, (1, 3, 3), mode="mirror") + 1e-9)
    emboss = np.array([[-2, -1, 0], [-1, 1, 1], [0, 1, 2]])
    shine = correlate(_equalised(distance), emboss[None], mode="mirror").clip(0, 255)
    return np.round(uniform_filter(np.round(shine), (1, 3, 3), mode="mirror"))


def _equalised(levels: np.ndarray) -> np.ndarray:
    """Histogram equalisation of whole numbers from 0 to 20, each image [H, W] by itself, to 0 ... 255."""
    n = len(levels)
    counts = np.stack([np.bincount(image.ravel(), minlength=21) for image in levels.astype(int)])
    lowest = np.take_along_axis(counts, (counts > 0).argmax(1)[:, None], 1)
    above = np.maximum(counts.cumsum(1) - lowest, 0)
    spread = levels[0].size - lowest
    table = np.where(spread == 0, np.arange(21), np.round(255 * above / np.maximum(spread, 1)))
    return table[np.arange(n)[:, None, None], levels.astype(int)]


def _edges(x: np.ndarray) -> np.ndarray:
    """Canny's edges of grey levels [n, H, W] at thresholds 50 and 150, as booleans: Sobel, |dx| + |dy|, thinned."""
    from scipy.ndimage import correlate1d, label

    def sobel(along: int, across: int) -> np.ndarray:
        return correlate1d(correlate1d(x, [-1, 0, 1], along, mode="nearest"), [1, 2, 1], across, mode="nearest")

    right, down = sobel(2, 1), sobel(1, 2)
    strength = np.abs(right) + np.abs(down)
    wide = np.pad(strength, ((0, 0), (1, 1), (1, 1)))

    def beside(row: int, column: int) -> np.ndarray:
        return wide[:, 1 + row : wide.shape[1] - 1 + row, 1 + column : wide.shape[2] - 1 + column]

    flat, steep = np.sqrt(2) - 1, np.sqrt(2) + 1  # tangents of 22.5 and 67.5 degrees
    level, upright = np.abs(down) < flat * np.abs(right), np.abs(down) > steep * np.abs(right)
    rising = (right < 0) != (down < 0)
    thin = np.select(
        [level, upright, rising],
        [
            (strength > beside(0, -1)) & (strength >= beside(0, 1)),
            (strength > beside(-1, 0)) & (strength >= beside(1, 0)),
            (strength > beside(-1, 1)) & (strength > beside(1, -1)),
        ],
        (strength > beside(-1, -1)) & (strength > beside(1, 1)),
    )
    within_image = np.zeros((3, 3, 3), bool)
    within_image[1] = True
    pieces, count = label(thin & (strength > 50), within_image)
    strong = np.zeros(count + 1, bool)
    strong[pieces[thin & (strength > 150)]] = True
    strong[0] = False
    return strong[pieces]
