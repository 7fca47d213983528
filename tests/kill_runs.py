"""python kill_runs.py FOLDER N [RANKS]: kill N small runs with SIGKILL, each at a random moment, and resume them.

With RANKS, a run is as many processes as torchrun would start, with its environment; one of them or all are killed,
and the others are asked to end. Prints, as JSON, how many were killed and the step from which each went on
(-1: from the beginning). Fails if one does not end with the same bytes as a run that was left alone.
"""

import json
import os
import random
import shutil
import signal
import socket
import sys
import time
import traceback
from pathlib import Path

import torch
import torch.distributed as dist
import torch.fx.experimental.symbolic_shapes  # autograd's first call imports it: here once, not in every child

from forde_fast import distributed, run
from forde_fast.checkpoint import Checkpoints
from forde_fast.config import TrainConfig
from forde_fast.signals import Interrupted

torch.set_num_threads(1)
run.CORRUPTIONS = ()
run.Run._draw = lambda self: None  # the figures take longer than all the rest, and nothing depends on them
run.Run.evaluate = lambda self: {}
DATA = run.load("digits")
run.load = lambda *arguments: DATA
SETTINGS = {"data": "digits", "members": 2, "epochs": 4, "width": 8, "train_size": 256, "batch_size": 32}
PATIENCE = 30  # seconds that ranks have to end after SIGTERM, as torchrun gives them


def left(status: int) -> int:
    """The status of a process that ends its group: gloo's threads, left to themselves, can abort it."""
    distributed.part()
    names = [Path(task, "comm").read_text() for task in Path("/proc/self/task").iterdir()]
    return 1 if dist.is_initialized() or any("gloo" in name for name in names) else status


def start(folder: Path, resume: bool, ranks: int, prepare=lambda rank: None) -> list[int]:
    """Children that train, each after `prepare`; their process ids. They end as the command line would."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    children = []
    for rank in range(ranks):
        child = os.fork()
        if child == 0:
            status = 1
            try:
                if ranks > 1:
                    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)}
                    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
                prepare(rank)
                run.Run(TrainConfig(**SETTINGS, checkpoint_every=3, out=str(folder))).train(resume)
                status = left(0)
            except Interrupted as stop:
                status = left(128 + stop.number)
            except OSError as error:
                print(error, file=sys.stderr)
            except RuntimeError as error:
                if not distributed.lost(error):
                    traceback.print_exc()
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(status)
        children.append(child)
    return children


def statuses(children: list[int], patience: float = float("inf")) -> list[int]:
    """Of all, negative for signals; what has not ended by then is killed."""
    ended, late = [], time.monotonic() + patience
    for child in children:
        while not (found := os.waitpid(child, os.WNOHANG))[0]:
            time.sleep(0.005)
            if time.monotonic() > late:
                os.kill(child, signal.SIGKILL)
        ended.append(os.waitstatus_to_exitcode(found[1]))
    return ended


def finished(children: list[int]) -> bool:
    return not any(statuses(children))


def main(folder: Path, count: int, ranks: int = 1) -> None:
    begun = time.monotonic()
    assert finished(start(folder / "whole", False, ranks))
    lasts = time.monotonic() - begun
    wanted = [(folder / "whole" / name).read_bytes() for name in ("checkpoint.safetensors", "log.jsonl")]
    moments, killed, steps = random.Random(time.time_ns()), 0, []
    while killed < count:
        one = folder / str(killed)
        children = start(one, False, ranks)
        time.sleep(moments.uniform(0, lasts))
        first = children if moments.random() < 0.5 else [moments.choice(children)]
        for child in first:
            os.kill(child, signal.SIGKILL)
        for child in set(children) - set(first):  # as torchrun does when one has ended
            os.kill(child, signal.SIGTERM)
        if not any(statuses(children, PATIENCE)):  # they were faster than the first ones
            shutil.rmtree(one)
            continue
        killed += 1
        steps.append(max(Checkpoints(one / "checkpoints").steps(), default=-1))
        assert finished(start(one, True, ranks)), one
        for name, content in zip(("checkpoint.safetensors", "log.jsonl"), wanted, strict=True):
            assert (one / name).read_bytes() == content, f"{one / name} after a kill at {steps[-1]}"
        assert not list(folder.glob("**/*.damaged"))
    print(json.dumps([killed, steps]))


if __name__ == "__main__":
    main(Path(sys.argv[1]), *map(int, sys.argv[2:]))
