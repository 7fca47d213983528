"""python kill_runs.py FOLDER N: kill N small runs with SIGKILL, each at a random moment, and resume them.

Prints, as JSON, how many were killed and the step from which each went on (-1: from the beginning). Fails if one
does not end with the same bytes as a run that was left alone.
"""

import json
import os
import random
import signal
import sys
import time
from pathlib import Path

import torch
import torch.fx.experimental.symbolic_shapes  # autograd's first call imports it: here once, not in every child

from forde_fast import run
from forde_fast.checkpoint import Checkpoints
from forde_fast.config import TrainConfig

torch.set_num_threads(1)
run.CORRUPTIONS = ()
run.Run._draw = lambda self: None  # the figures take longer than all the rest, and nothing depends on them
run.Run.evaluate = lambda self: {}
DATA = run.load("digits")
run.load = lambda *arguments: DATA
SETTINGS = {"data": "digits", "members": 2, "epochs": 4, "width": 8, "train_size": 256, "batch_size": 32}


def start(folder: Path, resume: bool) -> int:
    """A child that trains; its process id."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            run.Run(TrainConfig(**SETTINGS, checkpoint_every=3, out=str(folder))).train(resume)
            status = 0
        finally:
            os._exit(status)
    return child


def finished(child: int) -> bool:
    return os.waitpid(child, 0)[1] == 0


def main(folder: Path, count: int) -> None:
    begun = time.monotonic()
    assert finished(start(folder / "whole", False))
    lasts = time.monotonic() - begun
    wanted = [(folder / "whole" / name).read_bytes() for name in ("checkpoint.safetensors", "log.jsonl")]
    moments, killed, steps = random.Random(time.time_ns()), 0, []
    while killed < count:
        one = folder / str(killed)
        child = start(one, False)
        time.sleep(moments.uniform(0, lasts))
        os.kill(child, signal.SIGKILL)
        if finished(child):  # it was faster than the first one
            for path in sorted(one.iterdir(), reverse=True):
                path.unlink()
            continue
        killed += 1
        steps.append(max(Checkpoints(one / "checkpoints").steps(), default=-1))
        assert finished(start(one, True)), one
        for name, content in zip(("checkpoint.safetensors", "log.jsonl"), wanted, strict=True):
            assert (one / name).read_bytes() == content, f"{one / name} after a kill at {steps[-1]}"
    print(json.dumps([killed, steps]))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
