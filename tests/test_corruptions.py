"""Corruptions against what the published recipe made of the same images (golden/corruptions.npz)."""

import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch

from forde_fast.config import TrainConfig
from forde_fast.data import CORRUPTIONS, corrupt, load
from forde_fast.data.corruptions import CIFAR_SEVERITIES, GREY_SEVERITIES
from forde_fast.data.corruptions import CORRUPTIONS as NAMES
from forde_fast.run import Run

NOISE = ("gaussian_noise", "shot_noise", "impulse_noise", "speckle_noise")
RANDOM = (*NOISE, "glass_blur", "motion_blur", "snow", "frost", "fog", "elastic_transform", "spatter")
FIXED = tuple(name for name in CORRUPTIONS if name not in RANDOM)
SEVERITIES = (1, 2, 3, 4, 5)


@pytest.fixture(scope="module")
def golden():
    with np.load(Path(__file__).parent / "golden" / "corruptions.npz") as stored:
        return dict(stored)


@pytest.fixture(scope="module")
def grey():
    return load("fashion-mini").test_images[:32].numpy()


def rms(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.sqrt(np.mean((a.astype(float) - b) ** 2)))


@pytest.mark.parametrize("severity", SEVERITIES)
@pytest.mark.parametrize("name", [name for name in FIXED if name != "jpeg_compression"])
def test_fixed_ones_equal_the_recipe_to_the_byte(golden, name, severity):
    np.testing.assert_array_equal(corrupt(golden["images"], name, severity), golden[name][severity - 1])


@pytest.mark.parametrize("severity", SEVERITIES)
def test_jpeg_is_the_recipe_up_to_the_library_build(golden, severity):
    made = corrupt(golden["images"], "jpeg_compression", severity)
    difference = made.astype(float) - golden["jpeg_compression"][severity - 1]
    assert np.abs(difference).mean() <= 2


@pytest.mark.parametrize("severity", SEVERITIES)
@pytest.mark.parametrize("name", RANDOM)
def test_random_ones_have_the_recipes_statistics(golden, name, severity):
    """Over as many draws as the golden file's: both sides have the same error, estimated from ours."""
    images, draws = golden["images"], int(golden["draws"])
    made = corrupt(np.tile(images, (draws, 1, 1, 1)), name, severity)
    made = made.reshape(draws, *images.shape).astype(np.float64)
    total, squares = made.sum(0), (made**2).sum(0)
    deviations = _deviation(total, squares, draws)
    without_one = [_deviation(total - draw, squares - draw**2, draws - 1) for draw in made]  # the jackknife
    pixels = (2, 3, 4)
    for key, value, error in (
        ("mean", *_mean_and_error(made.mean(pixels))),
        ("rms_change", *_mean_and_error(((made - images) ** 2).mean(pixels))),
        ("pixel_std", deviations, np.sqrt((draws - 1) * np.var(without_one, axis=0))),
    ):
        expected = golden[f"{name}_{key}"][severity - 1]
        expected = expected**2 if key == "rms_change" else expected
        # 5 standard errors of the difference of two like estimates; SMALLEST where all draws are alike
        assert (np.abs(value - expected) <= 5 * np.sqrt(2) * error + SMALLEST).all(), key


SMALLEST = 1e-3  # grey levels


def _mean_and_error(per_draw: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return per_draw.mean(0), per_draw.std(0, ddof=1) / np.sqrt(len(per_draw))


def _deviation(total: np.ndarray, squares: np.ndarray, draws: int) -> np.ndarray:
    """The deviation over draws of each value, averaged over an image's."""
    return np.sqrt(np.maximum(squares / draws - (total / draws) ** 2, 0)).mean((1, 2, 3))


@pytest.mark.parametrize("name", RANDOM)
def test_seed_name_and_severity_choose_the_noise(golden, name):
    images = golden["images"]
    made = corrupt(images, name, 3, seed=7)
    np.testing.assert_array_equal(made, corrupt(images, name, 3, seed=7))
    assert (made != corrupt(images, name, 3, seed=8)).any()
    flat = np.full_like(images, 128)
    lost = [corrupt(flat, "impulse_noise", severity) != 128 for severity in (4, 5)]
    assert (lost[0] & ~lost[1]).any(), "severities share their draws"


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_chunks_and_the_images_behind_leave_no_trace(monkeypatch, grey, name):
    colour = np.stack([grey, grey[::-1], 255 - grey], axis=-1)
    made = corrupt(colour, name, 4, seed=3)
    np.testing.assert_array_equal(made[:5], corrupt(colour[:5], name, 4, seed=3))
    monkeypatch.setattr("forde_fast.data.corruptions.CHUNK_BYTES", 3 * colour[0].size)
    np.testing.assert_array_equal(made, corrupt(colour, name, 4, seed=3))


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_shapes_types_and_untouched_input(grey, name):
    kept = grey.copy()
    made = corrupt(grey, name, 2)
    assert made.dtype == np.uint8
    assert made.shape == grey.shape
    np.testing.assert_array_equal(made[..., None], corrupt(grey[..., None], name, 2))
    as_tensor = corrupt(torch.from_numpy(grey), name, 2)
    assert as_tensor.dtype == torch.uint8
    np.testing.assert_array_equal(made, as_tensor.numpy())
    np.testing.assert_array_equal(grey, kept)
    assert not np.shares_memory(made, grey)

    colour = np.stack([grey, 255 - grey, grey // 2], axis=-1)
    strided = np.asfortranarray(colour)[:, ::-1]  # neither contiguous nor in C order
    np.testing.assert_array_equal(corrupt(strided, name, 2), corrupt(strided.copy(order="C"), name, 2))
    assert corrupt(grey[:0], name, 2).shape == (0, 28, 28)
    oblong = np.random.default_rng(0).integers(0, 256, (2, 8, 12, 3), dtype=np.uint8)  # digits' height
    assert corrupt(oblong, name, 5).shape == oblong.shape


SHARED_DRAWS = ("glass_blur", "motion_blur", "snow", "fog", "elastic_transform")  # one for all channels


@pytest.mark.parametrize("name", [name for name in (*FIXED, *SHARED_DRAWS) if name != "jpeg_compression"])
def test_grey_images_change_like_colour_ones_without_colour(grey, name):
    """A grey image and the same one as RGB: but for saturate, which may tint what is stored as RGB."""
    made = corrupt(grey, name, 3)
    as_colour = corrupt(np.repeat(grey[..., None], 3, axis=-1), name, 3)
    difference = np.abs(as_colour.astype(int) - made[..., None])
    assert difference.max() <= 1  # one grey level of rounding on the way through HSV
    if name == "saturate":
        np.testing.assert_array_equal(made, grey)


@pytest.mark.parametrize("name", ["gaussian_noise", "shot_noise", "gaussian_blur", "pixelate"])
def test_grey_preset_is_harder_where_it_differs(grey, name):
    changes = [rms(corrupt(grey, name, severity, preset="grey"), grey) for severity in SEVERITIES]
    assert changes == sorted(changes)
    assert changes[0] > rms(corrupt(grey, name, 1), grey)
    assert changes[4] > 1.5 * rms(corrupt(grey, name, 5), grey)


@pytest.mark.parametrize("shape", [(2, 1, 1), (1, 1, 1, 3), (2, 2, 3, 3), (1, 5, 40), (1, 130, 90, 3)])
@pytest.mark.parametrize("name", CORRUPTIONS)
def test_any_size_and_images_of_one_colour(name, shape):
    for grey_level in (0, 255):
        images = np.full(shape, grey_level, np.uint8)
        with warnings.catch_warnings(action="error"):
            assert corrupt(images, name, 5).shape == shape


def test_frost_covers_images_that_are_larger_than_its_textures():
    made = corrupt(np.zeros((1, 320, 1000), np.uint8), "frost", 5)
    assert (made > 0).mean() > 0.99


def test_frost_without_its_textures_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch_uncertainty_assets", None)
    monkeypatch.setitem(sys.modules, "torch_uncertainty_assets.frost", None)
    message = "frost: expected the package with its textures, from pip install torch-uncertainty-assets, got none"
    with pytest.raises(ValueError, match=message):
        corrupt(np.zeros((1, 29, 31), np.uint8), "frost", 1)
    with pytest.raises(ValueError, match=message):  # before the training, not after it
        Run(TrainConfig(data="digits"))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"name": "fog_of_war"}, ValueError, "name: expected one of gaussian_noise, .*, got 'fog_of_war'"),
        ({"severity": 0}, ValueError, "severity: expected an integer from 1 to 5, got 0"),
        ({"severity": 6}, ValueError, "severity.*got 6"),
        ({"severity": 2.5}, ValueError, r"severity.*got 2\.5"),
        ({"preset": "hard"}, ValueError, "preset: expected one of cifar, grey, got 'hard'"),
        ({"seed": -1}, ValueError, "seed: expected a whole number >= 0, got -1"),
        ({"images": [[0]]}, TypeError, "images: expected a numpy array or a torch tensor, got list"),
        ({"images": np.zeros((2, 8, 8))}, TypeError, "images: expected uint8, got float64"),
        ({"images": torch.zeros(2, 8, 8)}, TypeError, r"images: expected uint8, got torch\.float32"),
        ({"images": np.zeros((8, 8), np.uint8)}, ValueError, r"images: .*got \[8, 8\]"),
        ({"images": np.zeros((2, 0, 8), np.uint8)}, ValueError, r"images: .*got \[2, 0, 8\]"),
        ({"images": np.zeros((2, 3, 8, 8), np.uint8)}, ValueError, r"C 1 or 3, got \[2, 3, 8, 8\]"),
    ],
)
def test_errors_name_the_argument(change, error, message):
    arguments = {"images": np.zeros((2, 8, 8), np.uint8), "name": "contrast", "severity": 1}
    with pytest.raises(error, match=message):
        corrupt(**(arguments | change))


def test_every_severity_is_there():
    assert len(set(CORRUPTIONS)) == 19
    assert {name for name in CORRUPTIONS if GREY_SEVERITIES[name] != CIFAR_SEVERITIES[name]} == {
        "gaussian_noise",
        "shot_noise",
        "gaussian_blur",
        "pixelate",
    }
    assert NAMES == CORRUPTIONS == tuple(CIFAR_SEVERITIES) == tuple(GREY_SEVERITIES)
    assert all(len(levels) == 5 for table in (CIFAR_SEVERITIES, GREY_SEVERITIES) for levels in table.values())
