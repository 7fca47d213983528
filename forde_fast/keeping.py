"""What a run does between its steps: lines and bars, checkpoints, and stopping all ranks when one has to."""

from __future__ import annotations

import time
from contextlib import ExitStack
from typing import TYPE_CHECKING

from forde_fast import guards
from forde_fast.data import Loader
from forde_fast.evaluation import METRICS
from forde_fast.signals import Interrupted, StopSignals
from forde_fast.step import ALONE
from forde_fast.trainer import Log, Trainer
from forde_fast.watching import JSONLines, Progress, TensorBoard, append_line, keep_lines

if TYPE_CHECKING:
    from forde_fast.run import Run

FAILED = 255  # what a rank says whose checkpoint could not be written, among the numbers of signals


class Keeper:
    """Callbacks of a run's `Trainer.fit`; within `with`, as they hold files open.

    before    seconds that earlier parts of the training took
    progress  show on stderr how far it is
    """

    def __init__(self, run: Run, trainer: Trainer, loader: Loader, stop: StopSignals, before: float, progress: bool):
        self.run, self.trainer, self.stop = run, trainer, stop
        self._before, self._start = before, time.perf_counter()
        self._kept = self._start  # when the last checkpoint was begun
        self._first = run.mesh.rank == 0
        self._lines = self._board = None
        self._on_steps, self._opened = [], ExitStack()
        if self._first:
            self._open(loader, progress)

    def _open(self, loader: Loader, progress: bool) -> None:
        run, trainer = self.run, self.trainer
        whole = trainer.position.batch == 0  # else the epoch's line, if there is one, comes again
        keep_lines(run.folder / "epochs.jsonl", trainer.steps - (not whole))
        with self._opened as opened:  # closed at once if one of these fails
            self._lines = opened.enter_context(JSONLines(run.folder / "log.jsonl", trainer, trainer.steps))
            self._on_steps.append(self._lines)
            if progress:
                steps = run.config.epochs * len(loader)
                self._on_steps.append(opened.enter_context(Progress(trainer, steps, run.config.method)))
            if run.config.tensorboard:
                self._board = opened.enter_context(TensorBoard(run.folder / "tensorboard", trainer))
                self._on_steps.append(self._board.on_step)
            self._opened = opened.pop_all()

    def __enter__(self) -> Keeper:
        return self

    def __exit__(self, *exception) -> None:
        self._opened.__exit__(*exception)

    @property
    def seconds(self) -> float:
        """Of the whole training so far."""
        return self._before + time.perf_counter() - self._start

    def on_step(self, epoch: int, log: Log) -> None:
        for call in self._on_steps:
            call(epoch, log)
        every = self.run.config.checkpoint_every
        self._go_on(every is not None and self.trainer.steps % every == 0)

    def on_epoch(self, epoch: int, mean: Log) -> None:
        run = self.run
        loss = float(mean.cross_entropy) / self.trainer.members
        numbers = {"step": self.trainer.steps, "epoch": epoch, "member_cross_entropy": loss}
        if len(run.valid_labels):
            scores = run.validate()
            numbers |= {f"validation_{name}": scores[name] for name in METRICS}
        if self._board is not None:
            self._board.on_epoch(epoch, mean)
        if self._first:
            append_line(run.folder / "epochs.jsonl", numbers)
        self._go_on(run.mesh is not ALONE or time.perf_counter() - self._kept >= run.rest)  # all ranks, or none

    def finish(self) -> None:
        """Wait for the last checkpoint, and for all ranks."""
        self.run.checkpoints.finish()
        self.run.mesh.leave()

    def _go_on(self, due: bool) -> None:
        """Keep what is due, and stop all ranks where one has to."""
        asked = self.run.mesh.agree(FAILED if self.run.checkpoints.error else self.stop.number)
        if asked == FAILED:
            self.run.checkpoints.finish()
            raise OSError("another rank could not keep its checkpoint")
        if due or asked:
            self._keep()
        if asked:
            self.finish()
            raise Interrupted(asked)

    def _keep(self) -> None:
        run, self._kept = self.run, time.perf_counter()
        guards.check_state(run.ensemble, self.trainer.steps, run.own.start)
        if self._first:
            self._lines.flush()
        state = {**self.trainer.state_dict(), "seconds": self.seconds}
        run.checkpoints.begin(state, run.own, run.mesh.column == 0)
