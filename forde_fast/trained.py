"""A finished run, read back without its data: what it was trained on, and its answers to other images."""

from __future__ import annotations

import dataclasses
import json
import math
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from forde_fast import config as configuration
from forde_fast import models
from forde_fast.checkpoint import load_ensemble
from forde_fast.config import TrainConfig
from forde_fast.data import Images, Normalisation
from forde_fast.devices import find_device
from forde_fast.ensemble import Ensemble
from forde_fast.files import write
from forde_fast.methods import SHARED
from forde_fast.types import Prediction
from forde_fast.validation import expect, reason_of

FILE = "data.json"
CLOSE = 2e-3  # of a normalisation: images decoded by another library are still the same


@dataclass(frozen=True)
class TrainedOn:
    """What a run keeps of its training data: its networks mean nothing without it.

    classes  their names, in the order of the outputs
    shape    of an image, [H, W] or [H, W, C], or [F] of features
    samples  that were trained on, and the checksum of their labels in their order
    mean, std  of the normalisation
    """

    classes: tuple[str, ...]
    shape: tuple[int, ...]
    samples: int
    labels: int
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @classmethod
    def of(cls, images: Tensor, labels: Tensor, classes: tuple[str, ...], normalisation: Normalisation) -> TrainedOn:
        checksum = zlib.crc32(labels.numpy().tobytes())
        return cls(classes, tuple(images.shape[1:]), len(images), checksum, normalisation.mean, normalisation.std)

    @classmethod
    def read(cls, folder: Path) -> TrainedOn:
        """What `write` left in a run's folder. Raises FileNotFoundError or ValueError."""
        path = folder / FILE
        expect(path.is_file(), "run", f"a folder with {FILE}, which a run keeps beside its settings", folder,
               FileNotFoundError)  # fmt: skip
        kinds = {"classes": str, "shape": int, "samples": int, "labels": int, "mean": float, "std": float}
        try:
            held = json.loads(path.read_text(encoding="utf-8"))
            lists = {name for name in kinds if isinstance(held[name], list)}
            return cls(**{k: tuple(map(kind, held[k])) if k in lists else kind(held[k]) for k, kind in kinds.items()})
        except (ValueError, TypeError, LookupError, RecursionError) as error:
            raise ValueError(f"{path}: expected what a run keeps of its data, got {reason_of(error)}") from None

    def write(self, folder: Path) -> None:
        write(folder / FILE, json.dumps(dataclasses.asdict(self), indent=1).encode())

    @property
    def normalisation(self) -> Normalisation:
        return Normalisation(self.mean, self.std)

    @property
    def in_shape(self) -> tuple[int, int, int]:
        """C, H, W of what the model receives, or F, 1, 1."""
        height, width, channels = (*self.shape, 1)[:3] if len(self.shape) > 1 else (1, 1, self.shape[0])
        return channels, height, width

    def expect_same(self, others: TrainedOn) -> None:
        """ValueError unless the data are, as far as this tells, those that a run was begun with: `others`."""
        for field in dataclasses.fields(self):
            own, held = getattr(self, field.name), getattr(others, field.name)
            close = field.name in ("mean", "std") and len(own) == len(held)
            same = all(map(lambda a, b: math.isclose(a, b, abs_tol=CLOSE), own, held)) if close else own == held
            name = "checksum of the labels" if field.name == "labels" else field.name
            expect(same, "data_dir", f"the data that the run was begun with ({name} {held})", own)

    def fit(self, data: Images) -> Images:
        """Other data as this run's networks know them: with its normalisation, labels numbered as its classes.

        Raises ValueError for a class that it does not know, and for another shape.
        """
        unknown = [name for name in data.classes if name not in self.classes]
        known = f"classes of the run, {', '.join(self.classes)}"
        expect(not unknown, "data_dir", known, ", ".join(unknown))
        shape = tuple(data.test_images.shape[1:])
        expect(shape == self.shape, "data_dir", f"images of shape {list(self.shape)}", list(shape))
        number = torch.tensor([self.classes.index(name) for name in data.classes])
        labels = {part: number[getattr(data, part)] for part in ("train_labels", "test_labels")}
        return dataclasses.replace(data, classes=self.classes, normalisation=self.normalisation, **labels)


@dataclass(frozen=True)
class Trained:
    """An ensemble with what comes before and after it.

    config      settings of the run
    trained_on  classes, shape and normalisation
    ensemble    in plain PyTorch's layers, on `device`
    """

    config: TrainConfig
    trained_on: TrainedOn
    ensemble: Ensemble
    device: torch.device

    def predict(self, images: Tensor | np.ndarray) -> Prediction:
        """uint8 images [N, H, W] or [N, H, W, C], or floating features [N, F], as they are stored -> as
        `Ensemble.predict` does. Raises TypeError or ValueError for others."""
        shape = self.trained_on.shape
        images = torch.from_numpy(np.array(images)) if isinstance(images, np.ndarray) else images
        expect(isinstance(images, Tensor), "images", "an array or a tensor", type(images).__name__, TypeError)
        expected = f"shape {['N', *shape]}, as the run's".replace("'", "")
        expect(tuple(images.shape[1:]) == shape and len(images) > 0, "images", expected, list(images.shape))
        return self.ensemble.predict(self.trained_on.normalisation(images).to(self.device))


def load_run(folder: str | Path, device: str = "auto") -> Trained:
    """The ensemble of a finished run, with which images are classified anywhere: its data are not needed.

    Raises FileNotFoundError or ValueError for a folder without a finished run, and for a device that is not here.
    """
    folder, place = Path(folder), find_device(device)
    expect((folder / "config.toml").is_file(), "run", "the folder of a run, with its config.toml", folder,
           FileNotFoundError)  # fmt: skip
    settings = configuration.read(folder / "config.toml")
    config = TrainConfig(**{**settings, "backend": "auto", "tensorboard": False, "out": str(folder)})
    found = TrainedOn.read(folder)
    ensemble = make_ensemble(config, found)
    load_ensemble(folder / "checkpoint.safetensors", ensemble)
    return Trained(config, found, ensemble.to(place), place)


def make_model(config: TrainConfig, trained_on: TrainedOn) -> torch.nn.Module:
    return models.make(config.model, len(trained_on.classes), trained_on.in_shape, config.width)


def shared_layers(config: TrainConfig):
    """What the members of the run's method have in common."""
    return SHARED.get(config.method, ()) if config.repulsion_weight else ()


def make_ensemble(config: TrainConfig, trained_on: TrainedOn) -> Ensemble:
    """The members at the beginning of the run, all of them."""
    return Ensemble(lambda: make_model(config, trained_on), config.members, config.seed, shared_layers(config))
