"""python rank_runs.py FOLDER: runs of several processes that are stopped and go on as another number of them.

Prints, as JSON, what `test_distributed.py` looks at.
"""

import errno
import json
import os
import shutil
import signal
import sys
from pathlib import Path

import kill_runs
import torch
from safetensors.torch import load_file

from forde_fast import checkpoint, models
from forde_fast.trainer import Trainer


def at_step(number: int, act):
    """In rank 1, after so many steps."""

    def prepare(rank: int) -> None:
        original = Trainer.step

        def step(self, *given):
            log = original(self, *given)
            if self.steps == number:
                act()
            return log

        if rank == 1:
            Trainer.step = step

    return prepare


def full_disk() -> None:
    def write(path, content):
        raise OSError(errno.ENOSPC, "No space left on device")

    checkpoint.write = write


def off(folder: Path, other: Path) -> float:
    """How far the members of two runs are apart, relatively."""
    own, wanted = (load_file(each / "checkpoint.safetensors") for each in (folder, other))
    own, wanted = (torch.cat([each[name].double().flatten() for name in sorted(wanted)]) for each in (own, wanted))
    return float((own - wanted).norm() / wanted.norm())


def main(folder: Path) -> None:
    found = {}
    for ranks in (1, 2):
        assert kill_runs.finished(kill_runs.start(folder / f"whole{ranks}", False, ranks))
    stopped = folder / "stopped"
    act = at_step(9, lambda: os.kill(os.getpid(), signal.SIGTERM))
    found["stopped"] = kill_runs.statuses(kill_runs.start(stopped, False, 2, act))
    kept = checkpoint.Checkpoints(stopped / "checkpoints")
    found["kept"] = kept.check()[0]
    module = models.make("mlp", 10, (1, 8, 8), kill_runs.SETTINGS["width"])
    module.load_state_dict(checkpoint.read_member(kept.folder, 1))  # a plain module
    for ranks in (1, 2, 3):
        copy = folder / f"copy{ranks}"
        shutil.copytree(stopped, copy)
        assert kill_runs.finished(kill_runs.start(copy, True, ranks))
        found[f"off as {ranks}"] = off(copy, folder / "whole1")
    same = ((folder / one / "checkpoint.safetensors").read_bytes() for one in ("copy2", "whole2"))
    found["same bytes"] = next(same) == next(same)
    full = folder / "full"
    found["full"] = kill_runs.statuses(kill_runs.start(full, False, 2, at_step(10, full_disk)))
    found["kept before"] = checkpoint.Checkpoints(full / "checkpoints").check()[0]
    assert kill_runs.finished(kill_runs.start(full, True, 2))
    found["off after"] = off(full, folder / "whole2")
    print(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
