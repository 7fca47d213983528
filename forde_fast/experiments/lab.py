"""What every experiment works with: data, trained ensembles, corrupted images, and a place for what comes out."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from forde_fast import methods, models
from forde_fast.config import FIELDS, TrainConfig
from forde_fast.data import Loader, Normalisation, load
from forde_fast.data.corruptions import CORRUPTIONS
from forde_fast.ensemble import Ensemble
from forde_fast.experiments.corrupted import Corrupted
from forde_fast.experiments.summary import interval
from forde_fast.files import make_folder, write
from forde_fast.methods import Method
from forde_fast.trainer import Log, Trainer
from forde_fast.validation import whole


@dataclass(frozen=True)
class Setting:
    """repulsion_weight  of FoRDE; that of other methods is 1, their published strength
    spread            each corrupted test image at one severity, the five in turn, instead of at each
    """

    data: str = "fashion-mini"
    model: str = "mlp"
    width: int | None = 64
    members: int = 5
    seeds: int = 3  # whose 95 % interval is 4.3 standard errors to each side; that of two is 12.7
    epochs: int = 10
    lr: float = 0.1
    batch_size: int = 128
    weight_decay: float = 5e-4
    repulsion_weight: float = 20.0
    augment: bool = False
    strategy: str = "stacked"
    spread: bool = True
    image_size: int | None = None


PUBLISHED = Setting("cifar100", "resnet18", None, 10, 5, 300, repulsion_weight=1.0, augment=True, strategy="auto",
                    spread=False)  # fmt: skip
SETTINGS = {"small": Setting(), "paper": PUBLISHED, "paper-cifar10": dataclasses.replace(PUBLISHED, data="cifar10")}


class Trained(NamedTuple):
    """An ensemble, its log (name -> one number per step), and the seconds of its training."""

    ensemble: Ensemble
    log: dict[str, np.ndarray]
    seconds: float


class Lab:
    """One experiment's run: reads the data, trains what is asked for, writes into `out`."""

    def __init__(self, setting: Setting, out: Path, data_dir: str | None = None, device: str = "cpu",
                 say: Callable[[str], None] = lambda text: None):  # fmt: skip
        TrainConfig(**{name: value for name, value in vars(setting).items() if name in FIELDS})  # its checks
        whole(setting.seeds, "seeds")
        self.setting, self.out, self.device, self.say = setting, Path(out), torch.device(device), say
        self.data = load(setting.data, data_dir, image_size=setting.image_size)
        self.normalise = self.data.normalisation or Normalisation.fit(self.data.train_images)
        self.x = self.normalise(self.data.train_images).to(self.device)
        self.y = self.data.train_labels.to(self.device)
        self.classes, self.shape = len(self.data.classes), tuple(self.x.shape[1:])
        make_folder(self.out)

    @property
    def seeds(self) -> range:
        return range(self.setting.seeds)

    @property
    def grey(self) -> bool:
        return self.data.test_images.ndim == 3

    def method(self, name: str, alpha: float = 0.4) -> Method:
        return methods.make(name, self.x, alpha, data=self.setting.data)

    def trainer(self, method: str | Method, seed: int = 0, weight: float | None = None, members: int | None = None,
                strategy: str | None = None) -> Trainer:  # fmt: skip
        """method   a name or a Method
        weight   repulsion_weight; None: the setting's, or 1 for names that are not FoRDE's
        """
        setting, named = self.setting, isinstance(method, str)
        if weight is None:
            weight = 1.0 if named and not method.startswith("forde") else setting.repulsion_weight
        ensemble = Ensemble(
            lambda: models.make(setting.model, self.classes, self.shape, setting.width),
            members or setting.members,
            seed,
            methods.SHARED.get(method, ()) if named else (),
        ).to(self.device)
        return Trainer(
            ensemble,
            self.method(method) if named else method,
            repulsion_weight=weight,
            lr=setting.lr,
            weight_decay=setting.weight_decay,
            strategy=strategy or setting.strategy,
            seed=seed,
        )

    def train(self, method: str | Method, seed: int = 0, weight: float | None = None, members: int | None = None,
              title: str = "") -> Trained:  # fmt: skip
        """As `trainer`; `title` says what a Method is."""
        setting, trainer = self.setting, self.trainer(method, seed, weight, members)
        loader = Loader(self.x, self.y, setting.batch_size, augment=setting.augment, seed=seed)
        logs, begun = [], time.perf_counter()
        trainer.fit(loader, setting.epochs, on_step=lambda epoch, log: logs.append(torch.stack(log)))
        log = torch.stack(logs).cpu().numpy()
        seconds = time.perf_counter() - begun
        self.say(f"{title or method}, seed {seed}: {seconds:.1f} s")
        return Trained(trainer.ensemble, dict(zip(Log._fields, log.T, strict=True)), seconds)

    def predict(self, ensemble: Ensemble, images: Tensor) -> Tensor:
        """uint8 images -> the members' probabilities [M, N, K]."""
        return ensemble.predict_members(self.normalise(images).to(self.device)).cpu()

    def corrupted(self, names=CORRUPTIONS, preset: str | None = None) -> Corrupted:
        """The test images under these corruptions; for grey images the harder preset."""
        preset = preset or ("grey" if self.grey else "cifar")
        spread = self.setting.spread
        folder = self.out / "corrupted" / f"{self.setting.data}-{preset}{'-spread' * spread}"
        return Corrupted(folder, self.data.test_images, self.data.test_labels, names, preset, spread)

    def write(self, name: str, text: str) -> None:
        write(self.out / name, text.encode())


def shown(values, digits: int = 3, factor: float = 1.0) -> str:
    """The mean of one number per seed, with the half width of its 95 % interval."""
    found = interval([factor * float(value) for value in values])
    return f"{found.mean:.{digits}f}" + ("" if np.isinf(found.half) else f" ± {found.half:.{digits}f}")
