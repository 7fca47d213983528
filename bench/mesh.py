"""python bench/mesh.py: do times on this machine follow `forde_fast/scaling.py`?

Two gloo processes, of one thread each. First an exchange and a sum of several sizes in turn: latency and bytes a
second are fitted to the smallest and the largest, and the others predicted. Then whole steps of a resnet18, alone
(each process by itself, both at once, so that two busy cores are what is compared), members split and batch split in
turn: the model is given these latencies and speeds and the time alone, and predicts the other two. Printed are the
ratios of measured to predicted.
"""

from __future__ import annotations

import functools
import os
import tempfile
import time
from statistics import median

import torch
import torch.distributed as dist
from torch.multiprocessing import start_processes

import forde_fast as ff
from forde_fast import scaling
from forde_fast.distributed import Mesh
from forde_fast.step import ALONE

ROUNDS, STEP_ROUNDS = 60, 7
COLUMNS = (256, 1024, 3072, 12288)  # of an exchange of 2 members on 128 samples
PARAMETERS = (10**5, 10**6, 4 * 10**6)  # of a sum of gradients
MEMBERS, BATCH, WIDTH = 2, 32, 16
GRIDS = {"alone": (1, 1), "members split": (2, 1), "batch split": (1, 2)}


def timed(calls: dict, rounds: int) -> dict:
    """Median seconds of each call, all of them in turn in every round."""
    times = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            dist.barrier()
            begin = time.perf_counter()
            call()
            times[name].append(time.perf_counter() - begin)
    return {name: median(own) for name, own in times.items()}


def time_calls() -> dict[str, tuple[float, float]]:
    """kind of call -> seconds of latency, bytes a second."""
    calls = {}
    for columns in COLUMNS:
        rows = torch.randn(128, columns)
        send = functools.partial(dist.all_to_all_single, torch.empty_like(rows), rows, [64, 64], [64, 64])
        calls["exchange", 64 * columns * 4] = send
    for size in PARAMETERS:
        calls["sum", 4 * size] = functools.partial(dist.all_reduce, torch.randn(size))
    found, fitted = timed(calls, ROUNDS), {}
    for kind in ("exchange", "sum"):
        sizes = sorted(size for name, size in found if name == kind)
        least, most = sizes[0], sizes[-1]
        pace = (found[kind, most] - found[kind, least]) / (most - least)
        latency = found[kind, least] - pace * least
        fitted[kind] = latency, 1 / pace
        say(f"{kind}: {1e6 * latency:.0f} us and {1e-9 / pace:.2f} GB/s")
        for size in sizes[1:-1]:
            measured, predicted = found[kind, size], latency + pace * size
            say(f"  {size:>9,} bytes: {1e3 * measured:.3f} ms, {measured / predicted:.2f} of what was predicted")
    tiny = torch.zeros(5, 64, dtype=torch.float64)  # a sum of a BatchNorm's channels
    fitted["latency"] = timed({"": functools.partial(dist.all_reduce, tiny)}, 10 * ROUNDS)[""], 0.0
    return fitted


def time_steps(fitted: dict[str, tuple[float, float]]) -> None:
    """Whole steps, measured and by the model."""

    def make():
        return ff.models.resnet18(width=WIDTH)

    x, y = torch.randn(BATCH, 3, 32, 32), torch.randint(10, (BATCH,), generator=torch.Generator().manual_seed(0))
    dist.broadcast(x, 0)
    steps, net = {}, make()
    for name, (rows, parts) in GRIDS.items():
        mesh = Mesh(MEMBERS, parts) if rows * parts > 1 else ALONE
        ensemble = ff.Ensemble(make, MEMBERS) if mesh is ALONE else mesh.ensemble(make)
        trainer = ff.Trainer(ensemble, mesh=mesh)
        trainer.step(x, y)  # the first one measures besides, as every tenth does
        steps[name] = functools.partial(trainer.step, x, y)
    found = timed(steps, STEP_ROUNDS)
    norms = [one for one in net.modules() if isinstance(one, torch.nn.BatchNorm2d)]
    step = scaling.Step(
        MEMBERS, BATCH, sum(p.numel() for p in net.parameters()), x[0].numel(),
        channels=sum(one.num_features for one in norms), norms=len(norms), forward=1.0,
    )  # fmt: skip
    for name, (rows, parts) in GRIDS.items():
        _, pace = fitted["sum" if parts > 1 else "exchange"]
        latency = fitted["latency" if parts > 1 else "exchange"][0]
        machine = scaling.Machine(6 * MEMBERS * BATCH / found["alone"], pace, pace, latency)
        model = scaling.simulate(step, machine, rows, parts)
        parts = ", ".join(f"{what} {1e3 * s:.1f}" for what, s in model.items() if s and what != "step")
        measured = found[name]
        say(f"{name}: {1e3 * measured:.1f} ms, {measured / model['step']:.2f} of what was predicted ({parts} ms)")


def say(line: str) -> None:
    if dist.get_rank() == 0:
        print(line, flush=True)


def child(rank: int, store: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(store, 2), rank=rank, world_size=2)
    time_steps(time_calls())
    dist.destroy_process_group()


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        start_processes(child, (os.path.join(folder, "store"),), nprocs=2, start_method="fork")
