"""A table of methods: tuned on a validation split, trained over seeds, scored clean and corrupted.

Every training is a run in a folder of its own, taken up where it was stopped and skipped where it is finished, so
that the same command goes on with a table that was interrupted.
"""

from __future__ import annotations

import dataclasses
import json
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from forde_fast import config as configuration
from forde_fast.config import TrainConfig
from forde_fast.data import Images, load, open_corrupted
from forde_fast.data.corruptions import CORRUPTIONS, EXTRA, HARDER, STANDARD
from forde_fast.devices import find_device
from forde_fast.evaluation import mean_scores, score_corrupted, score_members
from forde_fast.experiments.corrupted import Corrupted
from forde_fast.experiments.tables import Table
from forde_fast.files import make_folder, write
from forde_fast.run import Run
from forde_fast.scoring import diversity, flat
from forde_fast.validation import NotFinite, expect, refuse

TUNING_SEED = 1000  # the first of the seeds that tune: none of those that are reported
DECAY, ALPHA = 5e-4, 0.4  # the published weight decay; the published alpha on CIFAR-100
GROWS = ("seeds", "methods", "published")  # what a table in a folder may have more or less of: that only adds runs


class Setting(NamedTuple):
    """What is tuned. `repulsion_weight` is in units of the method's published strength."""

    weight_decay: float
    repulsion_weight: float
    alpha: float


class Tuned(NamedTuple):
    """`loss` is what tuning minimises, at `setting`; `ends` names what was chosen at an end of its candidates."""

    setting: Setting
    loss: float
    ends: dict[str, str]  # name -> "lowest" or "highest"


class Trial(Run):
    """A run among hundreds: checkpoints of short ones would take as long as the training, and nobody looks at figures
    of each."""

    rest = 30.0

    def _draw(self) -> None:
        """The report has the figures."""


class TunedRun(Trial):
    """A run whose scores are those of its validation images, clean and under the extra corruptions, which are not
    among the standard 15 that tables are judged by."""

    corrupted: Callable[[Run], Corrupted]

    def evaluate(self) -> dict:
        validation = self.validate()
        return {"validation": validation, "validation_corrupted": score_corrupted(self.predict, self.corrupted(self))}


class TableRun(Trial):
    """A run that is scored on corrupted images made once for all runs of a table."""

    test_sets: dict[str, Corrupted]

    def evaluate(self) -> dict:
        probs = self.predict(self.test_images)
        metrics = {"clean": flat(score_members(probs, self.test_labels)), "diversity": diversity(self, probs)}
        for group, images in self.test_sets.items():
            found = score_corrupted(self.predict, images)
            metrics[group] = found
            if group == "corrupted":
                by_name = found["by_corruption"]
                metrics["corrupted_all"] = mean_scores(by_name, by_name)
                found |= mean_scores(by_name, [name for name in by_name if name in STANDARD])
        return metrics


class Reproduction:
    """Everything that a table needs, checked and read before any work.

    corrupted_dir  CIFAR-10-C's files or others that `data.open_corrupted` reads, in the place of copies made here
    say            is told of every finished run. Raises ValueError for a folder that holds another table
    """

    def __init__(self, table: Table, folder: Path, data_dir: str | None = None, device: str = "auto",
                 say: Callable[[str], None] = lambda text: None, corrupted_dir: str | None = None):  # fmt: skip
        self.table, self.folder, self.data_dir, self.device, self.say = table, Path(folder), data_dir, device, say
        find_device(device)
        self.data: Images = load(table.data, data_dir)
        self.corrupted = None
        if corrupted_dir is not None:
            self.corrupted = open_corrupted(corrupted_dir, tuple(self.data.test_images.shape[1:]), self.data.classes)
        settings = json.loads(json.dumps(dataclasses.asdict(table)))
        path = self.folder / "table.json"
        if path.exists():
            held = json.loads(path.read_text(encoding="utf-8"))
            for name, own in settings.items():
                same = name in GROWS or own == held.get(name)
                expect(same, name, f"{held.get(name)} as the table in {folder} has it", own)
        elif self.folder.is_dir() and any(self.folder.iterdir()):
            refuse("out", "a new folder, or one with a table", folder, FileExistsError)
        make_folder(self.folder)
        self.settings = settings
        self._validation: dict[int, Corrupted] = {}
        self.done = self.skipped = 0

    def rows(self) -> Iterator[tuple[str, str, Setting, Tuned | None]]:
        """(row, method, setting, how it was chosen): every method tuned, and some at the published strength."""
        for method in self.table.methods:
            tuned = self.tune(method)
            yield method, method, tuned.setting, tuned
        for method in self.table.published:
            yield f"{method}-published", method, Setting(DECAY, 1.0, ALPHA), None

    def run(self) -> dict[str, dict]:
        """{row: {"method", "setting", "tuning", "metrics": [one per seed]}}; writes table.json and rows.json."""
        write(self.folder / "table.json", json.dumps(self.settings, indent=1).encode())
        self.begun = time.monotonic()
        found, trained = {}, {}
        for row, method, setting, tuned in self.rows():
            first = trained.setdefault((method, setting), row)  # what is published may be what was chosen: not twice
            runs = [
                self._finished(TableRun, self.config(method, setting, seed, f"runs/{first}/seed{seed}"))
                for seed in range(self.table.seeds)
            ]
            found[row] = {"method": method, "setting": setting._asdict(), "metrics": runs}
            if tuned is not None:
                found[row]["tuning"] = {"loss": tuned.loss, "ends": tuned.ends}
            write(self.folder / "rows.json", json.dumps(found).encode())
        return found

    def tune(self, method: str) -> Tuned:
        """The best of the candidates for weight decay, then w, then alpha, one after another: lowest mean of the
        negative log-likelihoods of validation images, clean and corrupted."""
        table = self.table
        best = Setting(table.weight_decays[0], table.weights(method)[0], table.alphas[0])
        searched = {"weight_decay": table.weight_decays, "repulsion_weight": table.weights(method)}
        if method == "forde-tuned":
            searched["alpha"] = table.alphas
        losses, ends = {best: self.loss(method, best)}, {}
        for name, candidates in searched.items():
            for setting in (best._replace(**{name: value}) for value in candidates):
                if setting not in losses:
                    losses[setting] = self.loss(method, setting)
            best = min(losses, key=losses.get)
            extremes = {min(candidates): "lowest", max(candidates): "highest"}
            if len(extremes) > 1 and getattr(best, name) in extremes:
                ends[name] = extremes[getattr(best, name)]
        trained = math.isfinite(losses[best])
        expect(trained, "method", "a setting that can be trained", f"{method}: all of them diverged")
        return Tuned(best, losses[best], ends)

    def loss(self, method: str, setting: Setting) -> float:
        """What tuning minimises."""
        losses = []
        for seed in range(TUNING_SEED, TUNING_SEED + self.table.tuning_seeds):
            name = "-".join(f"{value:g}" for value in setting)
            config = self.config(method, setting, seed, f"tuning/{method}/{name}/seed{seed}", self.table.validation)
            metrics = self._finished(TunedRun, config)
            if "diverged" in metrics:
                return float("inf")
            losses += [metrics[group]["nll"] for group in ("validation", "validation_corrupted")]
        return sum(losses) / len(losses)

    def config(self, method: str, setting: Setting, seed: int, out: str, validation: float = 0.0) -> TrainConfig:
        table = self.table
        same = ("data", "model", "width", "members", "epochs", "lr", "batch_size", "augment", "train_size",
                "test_size", "strategy")  # fmt: skip
        return TrainConfig(
            **{name: getattr(table, name) for name in same}, **setting._asdict(), method=method, seed=seed,
            validation=validation, data_dir=self.data_dir, device=self.device, out=str(self.folder / out),
        )  # fmt: skip

    def _finished(self, kind: type[Run], config: TrainConfig) -> dict:
        """The metrics of a run, which is trained if it is not there."""
        path = Path(config.out) / "metrics.json"
        if path.exists():
            self._check_setting(config)
            self.skipped += 1
        else:
            self._train(kind(config, self.data), path)
        return json.loads(path.read_text(encoding="utf-8"))  # the same whether it is new or was there

    def _check_setting(self, config: TrainConfig) -> None:
        """A run that was tuned over other candidates, by an older version, must not stand for this one."""
        path = Path(config.out) / "config.toml"
        held = configuration.read(path) if path.exists() else {}
        for name in Setting._fields:
            own = held.get(name, getattr(config, name))
            got = f"{own} (tuned over other candidates: move the folder away)"
            expect(own == getattr(config, name), name, f"{getattr(config, name)} in {config.out}", got)

    def _train(self, run: Run, path: Path) -> None:
        if isinstance(run, TunedRun):
            run.corrupted = self._validation_images
        else:
            run.test_sets = self._test_sets(run)
        try:
            metrics = run.train(resume=True)
            group = metrics.get("clean") or metrics["validation"]
            seen = f"accuracy {100 * group['accuracy']:.1f}, nll {group['nll']:.3f}"
        except NotFinite as error:
            if not isinstance(run, TunedRun):
                raise
            write(path, json.dumps({"diverged": str(error)}).encode())
            seen = "diverged"
        self.done += 1
        minutes = (time.monotonic() - self.begun) / 60
        self.say(f"{minutes:6.1f} min  {run.folder.relative_to(self.folder)}: {seen}")

    def _test_sets(self, run: Run) -> dict[str, Corrupted]:
        if self.corrupted is not None:
            return {"corrupted": self.corrupted}
        folder, spread = self.folder / "corrupted", self.table.spread
        given = run.test_images, run.test_labels
        sets = {"corrupted": Corrupted(folder / "cifar", *given, CORRUPTIONS, spread=spread)}
        if run.test_images.ndim == 3:
            names = [name for name in HARDER if name not in EXTRA]  # the extra ones tune
            sets["corrupted_grey"] = Corrupted(folder / "grey", *given, names, "grey", spread)
        return sets

    def _validation_images(self, run: Run) -> Corrupted:
        """By the corruptions that are not among the standard ones, which the table reports."""
        seed = run.config.seed
        if seed not in self._validation:
            preset = "grey" if run.valid_images.ndim == 3 else "cifar"
            folder = self.folder / "corrupted" / f"validation{seed}"
            given = run.valid_images, run.valid_labels
            self._validation[seed] = Corrupted(folder, *given, EXTRA, preset, self.table.spread, seed=1)
        return self._validation[seed]
