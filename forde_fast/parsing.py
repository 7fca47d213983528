"""A command line's parser: one line for bad input or for what stopped the work, and its exit status."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable
from typing import NoReturn, TypeVar

from forde_fast.validation import meant

Made = TypeVar("Made")


def rank() -> int:
    """Of this process among those that torchrun started."""
    return int(os.environ.get("RANK", "0"))


PATIENCE = 10.0  # seconds that the others leave the first process to say it: torchrun stops all when one ends


class Parser(argparse.ArgumentParser):
    """One line for bad input, and exit status 2; of several processes, one says it."""

    def error(self, message: str) -> NoReturn:
        if rank():
            time.sleep(PATIENCE)
        self.exit(2, f"{self.prog}: error: {' '.join(message.split())}\n")

    def refuse(self, unknown: list[str]) -> NoReturn:
        """Say which of the arguments this command does not know."""
        flags = self._option_string_actions
        self.error("unrecognized arguments: " + " ".join(text + meant(text.split("=")[0], flags) for text in unknown))

    def exit(self, status: int = 0, message: str | None = None) -> NoReturn:
        super().exit(status, message if rank() == 0 else None)

    def add_settings(self, *names: str, default: str | None = None) -> None:
        """A flag for each of these settings of `TrainConfig`, None where not given; default: what its help says."""
        from forde_fast.config import FIELDS, kind_of

        for name in names:
            flag, kind, text = "--" + name.replace("_", "-"), kind_of(name), FIELDS[name].metadata["help"]
            value = default or FIELDS[name].default
            if kind is bool:
                how, value = {"action": argparse.BooleanOptionalAction}, "yes" if value else "no"
            else:
                how = {"type": kind, "metavar": kind.__name__.upper()}
            if value is not None:
                text = f"{text.split('; default')[0]}; default: {value}"
            self.add_argument(flag, default=None, help=text.replace("%", "%%"), **how)

    def checked(self, prepare: Callable[[], Made]) -> Made:
        """What `prepare` makes, before any work; what is wrong with the input is one line and status 2."""
        try:
            return prepare()
        except BrokenPipeError:  # of what is printed, not of what comes in
            raise
        except (TypeError, ValueError, OSError) as error:
            self.error(str(error))

    def stop(self, reason: str) -> NoReturn:
        """One line from the process that something happened to, and status 1."""
        where = f" in rank {rank()}" if rank() else ""
        print(f"{self.prog}: error{where}: {reason}", file=sys.stderr)
        self.exit(1)
