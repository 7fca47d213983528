"""Ctrl-C and SIGTERM at a moment when everything can be kept."""

from __future__ import annotations

import signal
import threading

STOPPING = (signal.SIGINT, signal.SIGTERM)


class Interrupted(KeyboardInterrupt):
    """A stop that was asked for by signal `number`; by convention a program then exits with 128 + number."""

    def __init__(self, number: int, message: str = ""):
        super().__init__(message)
        self.number = number


class StopSignals:
    """Within `with StopSignals() as stop`, a first SIGINT or SIGTERM is noted in `stop.number` and does no more
    while `stop.waits`; the second one, or the first where nobody waits for it, raises Interrupted."""

    def __init__(self):
        self.number = 0
        self.waits = False
        self._before = {}

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():  # Python takes handlers there only
            self._before = {number: signal.signal(number, self._note) for number in STOPPING}
        return self

    def __exit__(self, *exception) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number, frame) -> None:
        if self.number or not self.waits:
            raise Interrupted(number)
        self.number = number
