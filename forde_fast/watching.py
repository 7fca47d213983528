"""Callbacks for `Trainer.fit`: what they are given per step and per epoch, as files."""

from __future__ import annotations

import importlib.util
import json
import os
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch

from forde_fast.files import write
from forde_fast.trainer import Log, Trainer
from forde_fast.validation import expect

FLUSH_EVERY = 50  # steps: reading a step's numbers at once would wait for the device
SUMMARY_EVERY = 10  # steps
SHOW_EVERY = 0.2  # seconds, for the same reason
PRINT_EVERY = 3.0  # seconds between lines in a file of output


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


class Bar:
    """A line on stderr: how far of `total`, a text, the remaining time. Where stderr is no terminal, a new line every
    few seconds."""

    def __init__(self, title: str, total: int, done: int = 0):
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

        texts = (TextColumn("[progress.description]{task.description}"), TextColumn("{task.fields[text]}"))
        console = Console(stderr=True)
        self._bar = Progress(texts[0], BarColumn(), texts[1], TimeRemainingColumn(), console=console)
        self._plain = not console.is_terminal
        self._bar.disable = self._plain
        self._task = self._bar.add_task(title, total=total, completed=done, text="")
        self._printed = time.monotonic()

    def advance(self, text: str | None = None) -> None:
        self._bar.update(self._task, advance=1, **({} if text is None else {"text": text}))
        if self._plain:
            task, now = self._bar.tasks[self._task], time.monotonic()
            if task.finished or now - self._printed > PRINT_EVERY:
                self._printed = now
                line = f"{task.description}: {task.completed:.0f} of {task.total:.0f} {task.fields['text']}"
                print(line.rstrip(), file=sys.stderr, flush=True)

    def __enter__(self) -> Bar:
        self._bar.start()
        return self

    def __exit__(self, *exception) -> None:
        self._bar.stop()


def watched(items: Iterable, title: str, total: int) -> Iterator:
    """The items, with a bar that says how many have been used."""
    with Bar(title, total) as bar:
        for item in items:
            yield item
            bar.advance()


class Progress(Bar):
    """A bar for a training: steps, members x images per second, loss of a member.

        with Progress(trainer, steps, "my run") as progress:
            trainer.fit(loader, epochs, on_step=progress)

    steps  of the whole training; those that the trainer has done count as done
    """

    def __init__(self, trainer: Trainer, steps: int, title: str = "training"):
        super().__init__(title, steps, trainer.steps)
        self.trainer = trainer
        self._last, self._first, self._begun, self._shown = steps, 0, 0.0, 0.0

    def __call__(self, epoch: int, log: Log) -> None:
        text, steps, now = None, self.trainer.steps, time.monotonic()
        if now - self._shown > SHOW_EVERY or steps >= self._last:
            text = f"loss {float(log.cross_entropy) / self.trainer.members:.3f}"  # waits for the device
            self._shown = now = time.monotonic()
            if self._first:
                speed = (steps - self._first) * self.trainer.rows / (now - self._begun)
                text = f"{speed:,.0f} members x images/s, {text}"
        if not self._first:  # from the end of the first step on, which chooses and compiles
            self._first, self._begun = steps, now
        self.advance(text)


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
