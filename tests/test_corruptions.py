"""Corruptions against what the published recipe made of the same images (golden/corruptions.npz)."""

from pathlib import Path

import numpy as np
import pytest
import torch

from forde_fast.data import CORRUPTIONS, corrupt, load
from forde_fast.data.corruptions import CIFAR_SEVERITIES, GREY_SEVERITIES
from forde_fast.data.corruptions import CORRUPTIONS as NAMES

RANDOM = ("gaussian_noise", "shot_noise", "impulse_noise", "speckle_noise")
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
    made = np.stack([corrupt(images, name, severity, seed).astype(float) for seed in range(draws)])
    changes = (made - images) ** 2
    pixels = (2, 3, 4)

    # Standard error of the difference of two means over n independent draws of a whole image: sqrt(2 / n)
    # times the deviation between draws. 5 of them are allowed; the largest of 720 comparisons came to 3.3.
    def check(per_draw: np.ndarray, expected: np.ndarray) -> None:
        allowed = 5 * np.sqrt(2 / draws) * per_draw.std(axis=0, ddof=1)
        assert (np.abs(per_draw.mean(axis=0) - expected) <= allowed).all()

    check(made.mean(axis=pixels), golden[f"{name}_mean"][severity - 1])
    check(changes.mean(axis=pixels), golden[f"{name}_rms_change"][severity - 1] ** 2)

    # The deviation over draws, averaged over an image's values: independent errors, so their squares add.
    deviations = made.std(axis=0)  # [12, 32, 32, 3]
    errors = _jackknife_error_of_deviation(made)
    allowed = 5 * np.sqrt(2 * (errors**2).mean(axis=(1, 2, 3)) / deviations[0].size)
    expected = golden[f"{name}_pixel_std"][severity - 1]
    assert (np.abs(deviations.mean(axis=(1, 2, 3)) - expected) <= allowed).all()


def _jackknife_error_of_deviation(made: np.ndarray) -> np.ndarray:
    """Jackknife error of each pixel's deviation over the draws: [draws, ...] -> [...]."""
    n = len(made)
    total, squares = made.sum(axis=0), (made**2).sum(axis=0)
    left_out = [
        np.sqrt(np.maximum((squares - draw**2) / (n - 1) - ((total - draw) / (n - 1)) ** 2, 0)) for draw in made
    ]
    return np.sqrt((n - 1) * np.var(left_out, axis=0))


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


@pytest.mark.parametrize("name", [name for name in FIXED if name != "jpeg_compression"])
def test_grey_images_change_like_colour_ones_without_colour(grey, name):
    """A grey image and the same one as RGB: but for saturate, which may tint what is stored as RGB."""
    made = corrupt(grey, name, 3)
    as_colour = corrupt(np.repeat(grey[..., None], 3, axis=-1), name, 3)
    difference = np.abs(as_colour.astype(int) - made[..., None])
    assert difference.max() <= 1  # one grey level of rounding on the way through HSV
    if name == "saturate":
        np.testing.assert_array_equal(made, grey)


@pytest.mark.parametrize("name", [name for name in CORRUPTIONS if name != "saturate"])
def test_grey_preset_gets_harder_and_is_never_milder(grey, name):
    changes = [rms(corrupt(grey, name, severity, preset="grey"), grey) for severity in SEVERITIES]
    assert changes == sorted(changes)
    changed = GREY_SEVERITIES[name] != CIFAR_SEVERITIES[name]
    assert changed == (name in {"gaussian_noise", "shot_noise", "gaussian_blur", "pixelate"})
    if changed:
        assert changes[0] > rms(corrupt(grey, name, 1), grey)
        assert changes[4] > 1.5 * rms(corrupt(grey, name, 5), grey)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"name": "fog_of_war"}, ValueError, "name: expected one of gaussian_noise, .*; got 'fog_of_war'"),
        ({"severity": 0}, ValueError, "severity: expected an integer from 1 to 5; got 0"),
        ({"severity": 6}, ValueError, "severity.*got 6"),
        ({"severity": 2.5}, ValueError, r"severity.*got 2\.5"),
        ({"preset": "hard"}, ValueError, "preset: expected one of cifar, grey; got 'hard'"),
        ({"seed": -1}, ValueError, "seed: expected a non-negative integer; got -1"),
        ({"images": [[0]]}, TypeError, "images: expected a numpy array or a torch tensor; got list"),
        ({"images": np.zeros((2, 8, 8))}, TypeError, "images: expected uint8; got float64"),
        ({"images": torch.zeros(2, 8, 8)}, TypeError, r"images: expected uint8; got torch\.float32"),
        ({"images": np.zeros((8, 8), np.uint8)}, ValueError, r"images: .*got \[8, 8\]"),
        ({"images": np.zeros((2, 3, 8, 8), np.uint8)}, ValueError, r"C 1 or 3; got \[2, 3, 8, 8\]"),
    ],
)
def test_errors_name_the_argument(change, error, message):
    arguments = {"images": np.zeros((2, 8, 8), np.uint8), "name": "contrast", "severity": 1}
    with pytest.raises(error, match=message):
        corrupt(**(arguments | change))


def test_every_severity_is_there():
    assert NAMES == CORRUPTIONS == tuple(GREY_SEVERITIES)
    assert all(len(levels) == 5 for table in (CIFAR_SEVERITIES, GREY_SEVERITIES) for levels in table.values())
