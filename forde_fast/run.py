"""A run: data, ensemble and method from a configuration; trained, evaluated, and kept in a folder.

The folder holds config.toml, log.jsonl, checkpoint.safetensors, metrics.json and two figures.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from forde_fast import config as configuration
from forde_fast import models, plots
from forde_fast.checkpoint import load_ensemble, save_ensemble
from forde_fast.config import TrainConfig
from forde_fast.data import Loader, Normalisation, load
from forde_fast.ensemble import Ensemble
from forde_fast.evaluation import evaluate_corruptions, score_members
from forde_fast.files import write
from forde_fast.methods import METHODS, RECIPES
from forde_fast.spaces import InputGradients
from forde_fast.trainer import Log, Trainer
from forde_fast.validation import expect

CORRUPTIONS = ("gaussian_noise", "shot_noise", "gaussian_blur", "contrast", "brightness", "pixelate")
FILES = ("config.toml", "log.jsonl", "checkpoint.safetensors", "metrics.json")


class Run:
    """Everything that is checked and read before any work: raises TypeError, ValueError or OSError in one line."""

    def __init__(self, config: TrainConfig):
        self.config = config
        self.folder = Path(config.out)
        self.device = _device(config.device)
        self.data = load(config.data, config.data_dir, config.download)
        parts = []
        for part, size in (("train", config.train_size), ("test", config.test_size)):
            images, labels = getattr(self.data, f"{part}_images"), getattr(self.data, f"{part}_labels")
            expect(size is None or size <= len(images), f"{part}_size", f"<= {len(images)}", size)
            parts += [images[:size], labels[:size]]
        self.images, self.labels, self.test_images, self.test_labels = parts
        self.normalisation = Normalisation.fit(self.images)
        channels = self.images.shape[3] if self.images.ndim == 4 else 1
        shape = (channels, *self.images.shape[1:3])
        self.ensemble = Ensemble(
            lambda: models.make(config.model, len(self.data.classes), shape, config.width),
            config.members,
            config.seed,
        ).to(self.device)
        self.strength = config.repulsion_weight * len(self.images) / min(config.batch_size, len(self.images))

    def train(self, on_step: Callable[[int, Log], None] | None = None) -> dict:
        """Train, evaluate, write the folder; returns the metrics. Raises FileExistsError if it holds a run."""
        self.refuse_to_overwrite()
        self.folder.mkdir(parents=True, exist_ok=True)
        write(self.folder / "config.toml", configuration.to_toml(self.config).encode())
        x = self.normalisation(self.images).to(self.device)
        name, recipe = RECIPES[self.config.method]
        method = METHODS[name]
        if method.space is not None:
            method = replace(method, space=InputGradients(self.config.score))
        trainer = Trainer(
            self.ensemble,
            method,
            recipe(x, self.config.alpha),
            self.config.repulsion_weight,
            backend=self.config.backend,
            lr=self.config.lr,
            weight_decay=self.config.weight_decay,
            seed=self.config.seed,
        )
        loader = Loader(
            x, self.labels.to(self.device), self.config.batch_size, augment=self.config.augment, seed=self.config.seed
        )
        repels = method.space is not None and self.config.members > 1
        start = time.perf_counter()
        with open(self.folder / "log.jsonl", "w", encoding="utf-8") as file:

            def record(epoch: int, log: Log) -> None:
                numbers = {key: float(getattr(log, key)) for key in (Log._fields if repels else Log._fields[:1])}
                file.write(json.dumps({"step": trainer.steps, "epoch": epoch, **numbers}) + "\n")
                if on_step is not None:
                    on_step(epoch, log)

            trainer.fit(loader, self.config.epochs, on_step=record)
        seconds = time.perf_counter() - start
        save_ensemble(self.folder / "checkpoint.safetensors", self.ensemble)
        seen = self.config.members * loader.batch_size * trainer.steps
        metrics = {"method": self.config.method, "strength": self.strength, "seconds": seconds}
        metrics |= {"members_x_images_per_second": seen / seconds, **self.evaluate()}
        write(self.folder / "metrics.json", json.dumps(metrics, indent=1).encode())
        self._draw()
        return metrics

    def evaluate(self) -> dict:
        """Scores on the clean test images and under corruption, at CIFAR-10-C's severities and, for grey images,
        at a harder preset (CIFAR-10-C's hardly touch them)."""
        metrics = {"clean": _flat(score_members(self.predict(self.test_images), self.test_labels))}
        presets = {"corrupted": "cifar"}
        if self.test_images.ndim == 3:
            presets["corrupted_grey"] = "grey"
        for group, preset in presets.items():
            metrics[group] = evaluate_corruptions(
                self.predict, self.test_images, self.test_labels, CORRUPTIONS, preset=preset
            )
        return metrics

    def predict(self, images: Tensor) -> Tensor:
        """uint8 images [N, H, W] or [N, H, W, C] -> the members' probabilities [M, N, K]."""
        return self.ensemble.predict_members(self.normalisation(images).to(self.device)).cpu()

    def log(self) -> list[dict]:
        """What log.jsonl holds: one dict per step."""
        return [json.loads(line) for line in (self.folder / "log.jsonl").read_text(encoding="utf-8").splitlines()]

    def refuse_to_overwrite(self) -> None:
        held = [name for name in FILES if (self.folder / name).exists()]
        expect(
            not held,
            "out",
            "a folder without a run",
            f"{self.folder}, which holds {', '.join(held)}",
            FileExistsError,
        )
        expect(not self.folder.is_file(), "out", "a folder", f"the file {self.folder}", FileExistsError)

    def _draw(self) -> None:
        plots.training(self.log(), self.folder / "training.png")
        shown = slice(0, 12)
        images, labels = self.test_images[shown], self.test_labels[shown]
        plots.predictions(
            images,
            labels,
            self.predict(images),
            self.data.classes,
            self.folder / "predictions.png",
            self.config.method,
        )


def open_run(folder: str | Path, data_dir: str | None = None) -> Run:
    """The run that a folder holds, trained. Raises FileNotFoundError or ValueError for a folder without one."""
    folder = Path(folder)
    held = (folder / "config.toml").is_file()
    expect(held, "run", "the folder of a run, with its config.toml", folder, FileNotFoundError)
    settings = configuration.read(folder / "config.toml")
    run = Run(TrainConfig(**{**settings, "out": str(folder), **({"data_dir": data_dir} if data_dir else {})}))
    load_ensemble(folder / "checkpoint.safetensors", run.ensemble)
    return run


def _device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device: expected one that is here, got {name!r} ({str(error).splitlines()[0]})") from None
    return device


def _flat(scores: dict) -> dict:
    return {**scores["ensemble"], "members": scores["members"]}
