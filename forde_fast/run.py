"""A run: data, ensemble and method from a configuration; trained, evaluated, and kept in a folder.

The folder holds config.toml, log.jsonl, checkpoint.safetensors, metrics.json and two figures; while it trains,
its last two states in checkpoints/.
"""

from __future__ import annotations

import copy
import functools
import json
import shlex
import shutil
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from forde_fast import config as configuration
from forde_fast import distributed, guards, plots, threads, trained
from forde_fast.checkpoint import Checkpoints, load_ensemble, save_ensemble
from forde_fast.config import TrainConfig
from forde_fast.data import (
    CORRUPTIONS,
    Images,
    Loader,
    Normalisation,
    load,
    load_unknown,
    open_corrupted,
    stratified,
)
from forde_fast.data.corruptions.weather import texture_folder
from forde_fast.devices import find_device, is_here
from forde_fast.ensemble import Ensemble
from forde_fast.evaluation import score_members
from forde_fast.files import make_folder, write
from forde_fast.keeping import Keeper
from forde_fast.methods import make
from forde_fast.scoring import flat, score_run
from forde_fast.signals import StopSignals
from forde_fast.step import ALONE
from forde_fast.strategies import LOOP, Graphs
from forde_fast.trained import TrainedOn, make_ensemble, make_model, shared_layers
from forde_fast.trainer import Trainer
from forde_fast.validation import expect, names_in
from forde_fast.watching import check_tensorboard, watched

FILES = (
    "config.toml", trained.FILE, "log.jsonl", "epochs.jsonl", "checkpoints", "checkpoint.safetensors", "metrics.json",
    "training.png", "predictions.png",
)  # fmt: skip


class Run:
    """Everything that is checked and read before any work: raises TypeError, ValueError or OSError in one line."""

    rest = 0.0  # seconds between the checkpoints that come after epochs
    watch = staticmethod(lambda items, total: items)  # what shows how far the scoring has come

    def __init__(self, config: TrainConfig, data: Images | None = None):
        """data: the configuration's, where it has been read already."""
        self.config = config
        if config.tensorboard:
            check_tensorboard()
        self.folder = Path(config.out)
        self.state: dict | None = None
        self.damaged: list[Path] = []
        self._prepared = False
        self.device = find_device(config.device)
        self.mesh = ALONE
        if distributed.launched():
            parts = config.data_parts or distributed.best_parts(
                config.members, distributed.ranks(), config.batch_size
            )
            self.mesh = distributed.Mesh(config.members, parts, config.sync_batchnorm, self.device.type)
        self.own = range(config.members)[self.mesh.own]
        self.checkpoints = Checkpoints(self.folder / "checkpoints", self.mesh.rank, self.mesh.ranks)
        if data is None:
            data = load(config.data, config.data_dir, config.download, config.image_size)
        self.data = data
        parts = []
        for part, size in (("train", config.train_size), ("test", config.test_size)):
            images, labels = getattr(self.data, f"{part}_images"), getattr(self.data, f"{part}_labels")
            expect(size is None or size <= len(images), f"{part}_size", f"<= {len(images)}", size)
            parts += [images[:size], labels[:size]]
        self.images, self.labels, self.test_images, self.test_labels = parts
        rest, held = (torch.arange(len(self.labels)), torch.arange(0))
        if config.validation:
            rest, held = map(torch.from_numpy, stratified(self.labels.numpy(), config.validation, config.seed))
        self.valid_images, self.valid_labels = self.images[held], self.labels[held]
        self.images, self.labels = self.images[rest], self.labels[rest]
        expect(len(self.images) >= 2, "train_size", "2 training images or more", len(self.images))
        self.normalisation = self.data.normalisation or Normalisation.fit(self.images)
        self.trained_on = TrainedOn.of(self.images, self.labels, self.data.classes, self.normalisation)
        self.corrupted_files, pixels = None, self.trained_on.shape
        chosen = self.corruptions = config.corrupted_by(CORRUPTIONS)
        if config.corrupted_dir is not None and chosen:
            self.corrupted_files = open_corrupted(config.corrupted_dir, pixels, self.data.classes)
            if config.corruptions not in (None, "all"):
                self.corrupted_files.keep(chosen)
        elif "frost" in chosen and not self.data.table:
            texture_folder()  # what is missing is said before the training
        names = names_in(config.ood) if config.ood else ()
        self.unknown = {name: load_unknown(name, pixels, config.ood_dir, config.test_size) for name in names}
        if self.mesh is ALONE:
            self.ensemble = self._make_ensemble()
        else:
            given = (lambda: make_model(config, self.trained_on)), config.seed, shared_layers(config)
            self.ensemble = self.mesh.ensemble(*given).to(self.device)
            self.mesh.check(self.ensemble, config.strategy)
        self.strength = config.repulsion_weight * len(self.images) / min(config.batch_size, len(self.images))

    def prepare(self, resume: bool = False) -> None:
        """Check the folder; with `resume`, read the last state that it holds into `state` (None: none was kept).

        Raises FileExistsError for a folder that holds a run which is not to be resumed, or something else, and
        ValueError for one that was begun with other data, or whose checkpoints are damaged. Of those, the ones
        before a whole one are left in `damaged`.
        """
        if self._prepared:
            return
        step, damaged = self.mesh.told(lambda: self._look(resume))
        self.damaged = [Path(path) for path in damaged]
        if step is not None:
            self.state = self.checkpoints.read(step, self.own)
            self.ensemble.check_state(self.state["ensemble"])
        self._prepared = True

    def _look(self, resume: bool) -> tuple[int | None, list[str]]:
        """The step from which to go on, and damaged checkpoints."""
        make_folder(self.folder)
        if not resume:
            held = [name for name in FILES if (self.folder / name).exists()]
            got = f"{self.folder}, which holds {', '.join(held)} (--resume goes on with it)"
            expect(not held, "out", "a folder without a run", got, FileExistsError)
        if not resume or self.finished:
            return None, []
        if (self.folder / trained.FILE).exists():
            self.trained_on.expect_same(TrainedOn.read(self.folder))
        step, damaged = self.checkpoints.check()
        return step, [str(path) for path in damaged]

    def _make_ensemble(self) -> Ensemble:
        return make_ensemble(self.config, self.trained_on).to(self.device)

    @property
    def finished(self) -> bool:
        return (self.folder / "metrics.json").exists()

    def train(self, resume: bool = False, progress: bool = False) -> dict:
        """Train, evaluate, write the folder; returns the metrics.

        resume    go on with the run in the folder; if it is finished, these are its metrics
        progress  show on stderr how far it is

        A checkpoint is kept after every epoch and every `checkpoint_every` steps, and when SIGINT or SIGTERM
        ask to stop, which then raises `signals.Interrupted`. Errors besides those of `prepare`: OSError.

        Of several processes, started by torchrun, each keeps its part, and all stop when one is asked to. The first
        alone evaluates and writes what is not a checkpoint; the others return {}.
        """
        self.prepare(resume)
        if self.finished:
            self.mesh.leave()
            return json.loads((self.folder / "metrics.json").read_text(encoding="utf-8"))
        if progress:
            self.watch = functools.partial(watched, title=f"{self.config.method}: corrupted test sets")
        trainer, loader = self._trainer_and_loader()
        self.begin()
        seconds = 0.0
        if self.state is not None:
            trainer.load_state_dict(self.state)
            seconds = self.state.get("seconds", 0.0)
        with StopSignals() as stop, self._threads():
            with Keeper(self, trainer, loader, stop, seconds, progress) as keeper:
                stop.waits = True
                self._fit(trainer, loader, keeper)
                stop.waits = False
            seconds = keeper.seconds
            if self.mesh.rank:
                return {}
            if self.mesh is not ALONE:  # all members, from what all ranks kept at the end
                self.ensemble, self.mesh = self._make_ensemble(), ALONE
                self.ensemble.load_state_dict(self.checkpoints.read(trainer.steps)["ensemble"])
            save_ensemble(self.folder / "checkpoint.safetensors", self.ensemble)
            self.ensemble = self._make_ensemble()  # what is scored is what was kept, in plain layers
            load_ensemble(self.folder / "checkpoint.safetensors", self.ensemble)
            metrics = {"method": self.config.method, "strength": self.strength, "seconds": seconds}
            metrics["strategy"] = trainer.strategy_report
            metrics["members_x_images_per_second"] = trainer.steps * self.config.members * loader.batch_size / seconds
            metrics |= self.evaluate()
            self._draw()
            write(self.folder / "metrics.json", json.dumps(metrics, indent=1).encode())
        shutil.rmtree(self.checkpoints.folder, ignore_errors=True)
        return metrics

    def begin(self) -> None:
        """Leave in the folder what a resumed run goes by, unless it is finished."""
        if self.mesh.rank == 0 and not self.finished:
            self.trained_on.write(self.folder)
            write(self.folder / "config.toml", configuration.to_toml(self.config).encode())

    def _trainer_and_loader(self) -> tuple[Trainer, Loader]:
        config = self.config
        x = self.normalisation(self.images).to(self.device)
        trainer = Trainer(
            self.ensemble,
            make(config.method, x, config.alpha, config.score, config.data, config.rank),
            repulsion_weight=config.repulsion_weight,
            backend=config.backend,
            strategy=config.strategy,
            members_at_a_time=config.members_at_a_time,
            precision=config.precision,
            repulsion_every=config.repulsion_every,
            lr=config.lr,
            weight_decay=config.weight_decay,
            seed=config.seed,
            mesh=self.mesh,
        )
        labels = self.labels.to(self.device)
        return trainer, Loader(x, labels, config.batch_size, augment=config.augment, seed=config.seed)

    def _fit(self, trainer: Trainer, loader: Loader, keeper: Keeper) -> None:
        try:
            trainer.fit(loader, self.config.epochs, on_step=keeper.on_step, on_epoch=keeper.on_epoch)
        except Exception as error:
            if not guards.is_memory(error):
                raise
            error.__traceback__ = None  # it holds the graphs
            raise guards.OutOfMemory(self._what_fits(trainer, loader)) from None
        keeper.finish()

    def _what_fits(self, trainer: Trainer, loader: Loader) -> str:
        x, y = loader.images[: loader.batch_size], loader.labels[: loader.batch_size]
        one, space = Ensemble.from_modules([copy.deepcopy(self.ensemble.member(0))]), trainer.objective.method.space

        def graph(samples: int) -> Graphs:
            rows = torch.arange(samples, device=x.device) % len(x)
            graphs = Graphs(one, one.flat, None, x[rows], y[rows], trainer.objective.loss, LOOP, space)
            (graphs.plain if space is None else graphs.forward)()
            return graphs

        tried = min(self.config.members_at_a_time or len(self.ensemble), len(self.ensemble))
        return guards.what_fits(graph, tried, loader.batch_size, self.device)

    def evaluate(self) -> dict:
        """The metrics, as `scoring.score_run` has them."""
        with self._threads():
            return score_run(self, self.corruptions)

    def _threads(self) -> AbstractContextManager:
        if self.device.type != "cpu":
            return nullcontext()
        return threads.suited(self.ensemble.members[0], self.normalisation(self.images[: self.config.batch_size]))

    def validate(self) -> dict:
        return flat(score_members(self.predict(self.valid_images), self.valid_labels))

    def predict(self, images: Tensor | np.ndarray) -> Tensor:
        """uint8 images [N, H, W] or [N, H, W, C], or features -> the members' probabilities [M, N, K]."""
        images = torch.from_numpy(np.array(images)) if isinstance(images, np.ndarray) else images
        own = self.ensemble.predict_members(self.normalisation(images).to(self.device))
        return self.mesh.gather_members(own).cpu()

    def log(self) -> list[dict]:
        """What log.jsonl holds: one dict per step."""
        return [json.loads(line) for line in (self.folder / "log.jsonl").read_text(encoding="utf-8").splitlines()]

    def _draw(self) -> None:
        plots.training(self.log(), self.folder / "training.png")
        if self.data.table:
            return
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


def open_run(folder: str | Path, data: Images | None = None, **others: str | None) -> Run:
    """The run that a folder holds, trained, with `others` in the place of its settings.

    data  the run's, where it has been read already

    It need not have been trained on this machine: what only training needs may be missing. Other data are normalised
    as the run's were, and their classes must be among its own; without any data: `load_run`. Raises FileNotFoundError
    or ValueError for a folder without a run.
    """
    folder = Path(folder)
    held = (folder / "config.toml").is_file()
    inside = ", ".join(sorted(path.parent.name for path in folder.glob("*/config.toml")))
    got = f"{folder} (runs in it: {inside})" if inside else folder
    expect(held, "run", "the folder of a run, with its config.toml", got, FileNotFoundError)
    got = f"{folder} (go on with: forde-fast train --resume --out {shlex.quote(str(folder))})"
    expect(
        (folder / "checkpoint.safetensors").is_file(),
        "run",
        "a checkpoint file, of a finished run",
        got,
        FileNotFoundError,
    )
    settings = configuration.read(folder / "config.toml")
    settings |= {"backend": "auto", "tensorboard": False, "out": str(folder)}
    if not is_here(settings.get("device", "auto")):
        settings["device"] = "auto"
    if "data_dir" in others:
        settings["train_size"] = None  # other data may have fewer
    config = TrainConfig(**{**settings, **others})
    if data is None:
        data = load(config.data, config.data_dir, config.download, config.image_size)
    run = Run(config, TrainedOn.read(folder).fit(data))
    load_ensemble(folder / "checkpoint.safetensors", run.ensemble)
    return run
