"""Callbacks for `Trainer.fit`: what they are given per step and per epoch, as files."""

from __future__ import annotations

import importlib.util
import json
import os
import time
from pathlib import Path

import torch

from forde_fast.files import write
from forde_fast.trainer import Log, Trainer
from forde_fast.validation import expect

FLUSH_EVERY = 50  # steps: reading a step's numbers at once would wait for the device
SUMMARY_EVERY = 10  # steps
SHOW_EVERY = 0.2  # seconds, for the same reason


class JSONLines:
    """One JSON object per step: step, epoch, `rows` (members x samples) and the numbers of Log, of which there is
    only the cross-entropy where nothing repels.

        with JSONLines("log.jsonl", trainer) as log:
            trainer.fit(loader, epochs, on_step=log)

    keep_steps  of a file that is there already, lines up to this step are kept and the others cut off
    """

    def __init__(self, path: str | Path, trainer: Trainer, keep_steps: int = 0):
        self.trainer, self._waiting = trainer, []
        keep_lines(path, keep_steps)
        self._file = open(path, "a", encoding="utf-8")  # noqa: SIM115

    def __call__(self, epoch: int, log: Log) -> None:
        self._waiting.append((self.trainer.steps, epoch, self.trainer.rows, torch.stack(log)))
        if len(self._waiting) >= FLUSH_EVERY:
            self.flush()

    def flush(self) -> None:
        """Write all that is waiting, to the disk."""
        waiting, self._waiting = self._waiting, []
        fields = Log._fields if self.trainer.objective.repels(self.trainer.members) else Log._fields[:1]
        for step, epoch, rows, log in waiting:
            numbers = dict(zip(fields, log.tolist(), strict=False))
            self._file.write(json.dumps({"step": step, "epoch": epoch, "rows": rows, **numbers}) + "\n")
        self._file.flush()
        os.fsync(self._file.fileno())

    def __enter__(self) -> JSONLines:
        return self

    def __exit__(self, *exception) -> None:
        try:
            self.flush()
        finally:
            self._file.close()


def append_line(path: str | Path, record: dict) -> None:
    """One more line at the end of a file of JSON lines, on the disk when this returns."""
    with open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(record) + "\n")
        file.flush()
        os.fsync(file.fileno())


def keep_lines(path: str | Path, steps: int) -> None:
    """Cut a file of JSON lines off after the last whole one whose "step" is at most `steps`."""
    path, kept = Path(path), []
    for line in path.read_bytes().splitlines(keepends=True) if path.exists() else ():
        try:
            if json.loads(line)["step"] > steps or not line.endswith(b"\n"):
                break
        except (ValueError, KeyError, TypeError):  # cut in the middle by a kill
            break
        kept.append(line)
    write(path, b"".join(kept))


class Progress:
    """A line on stderr: how far, loss of a member, members x images per second, remaining time.

        with Progress(trainer, steps, "my run") as progress:
            trainer.fit(loader, epochs, on_step=progress)

    steps  of the whole training; those that the trainer has done count as done
    """

    def __init__(self, trainer: Trainer, steps: int, title: str = "training"):
        from rich.console import Console
        from rich.progress import BarColumn, TextColumn, TimeRemainingColumn
        from rich.progress import Progress as Bar

        texts = ("[progress.description]{task.description}", "{task.fields[rate]}", "{task.fields[loss]}")
        columns = (TextColumn(texts[0]), BarColumn(), *map(TextColumn, texts[1:]), TimeRemainingColumn())
        self.trainer = trainer
        self._bar = Bar(*columns, console=Console(stderr=True))
        self._task = self._bar.add_task(title, total=steps, completed=trainer.steps, rate="", loss="")
        self._first, self._begun, self._shown = trainer.steps, time.monotonic(), 0.0

    def __call__(self, epoch: int, log: Log) -> None:
        fields = {}
        if time.monotonic() - self._shown > SHOW_EVERY:
            self._shown = time.monotonic()
            speed = (self.trainer.steps - self._first) * self.trainer.rows / (self._shown - self._begun)
            fields["rate"] = f"{speed:,.0f} members x images/s"
            fields["loss"] = f"loss {float(log.cross_entropy) / self.trainer.members:.3f}"
        self._bar.update(self._task, advance=1, **fields)

    def __enter__(self) -> Progress:
        self._bar.start()
        return self

    def __exit__(self, *exception) -> None:
        self._bar.stop()


class TensorBoard:
    """Scalars of every SUMMARY_EVERY-th step and of every epoch, for TensorBoard (the extra `tensorboard`).

    with TensorBoard("runs/board", trainer) as board:
        trainer.fit(loader, epochs, on_step=board.on_step, on_epoch=board.on_epoch)
    """

    def __init__(self, folder: str | Path, trainer: Trainer):
        check_tensorboard()
        from torch.utils.tensorboard import SummaryWriter

        self.trainer = trainer
        self._writer = SummaryWriter(str(folder), purge_step=trainer.steps + 1 if trainer.steps else None)

    def on_step(self, epoch: int, log: Log) -> None:
        if self.trainer.steps % SUMMARY_EVERY == 0:
            self._add("step", log)

    def on_epoch(self, epoch: int, mean: Log) -> None:
        self._add("epoch", mean)

    def _add(self, group: str, log: Log) -> None:
        for name, value in zip(Log._fields, torch.stack(log).tolist(), strict=True):
            self._writer.add_scalar(f"{group}/{name}", value, self.trainer.steps)

    def __enter__(self) -> TensorBoard:
        return self

    def __exit__(self, *exception) -> None:
        self._writer.close()


def check_tensorboard() -> None:
    """Raise ValueError where the package tensorboard is not installed."""
    there = importlib.util.find_spec("tensorboard") is not None
    expect(there, "tensorboard", "the package, from pip install 'forde-fast[tensorboard]'", "none installed")
