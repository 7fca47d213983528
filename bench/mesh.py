"""python bench/mesh.py: do the times of gloo's calls on this machine follow the form of `forde_fast/scaling.py`?

Two processes time an exchange and a sum of several sizes in turn. Latency and bytes a second are fitted to the
smallest and the largest; the others are predicted, and the ratio of measured to predicted is printed.
"""

from __future__ import annotations

import functools
import os
import tempfile
import time
from statistics import median

import torch
import torch.distributed as dist

ROUNDS = 60
COLUMNS = (256, 1024, 3072, 12288)  # of an exchange of 2 members on 128 samples
PARAMETERS = (10**5, 10**6, 4 * 10**6)  # of a sum of gradients


def child(rank: int, store: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(store, 2), rank=rank, world_size=2)
    calls = {}
    for columns in COLUMNS:
        rows = torch.randn(128, columns)
        send = functools.partial(dist.all_to_all_single, torch.empty_like(rows), rows, [64, 64], [64, 64])
        calls["exchange", 64 * columns * 4] = send
    for size in PARAMETERS:
        calls["sum", 4 * size] = functools.partial(dist.all_reduce, torch.randn(size))
    times = {name: [] for name in calls}
    for _ in range(ROUNDS):
        for name, call in calls.items():
            dist.barrier()
            begin = time.perf_counter()
            call()
            times[name].append(time.perf_counter() - begin)
    found = {name: median(own) for name, own in times.items()}
    for kind in ("exchange", "sum") if rank == 0 else ():
        sizes = sorted(size for name, size in found if name == kind)
        least, most = sizes[0], sizes[-1]
        pace = (found[kind, most] - found[kind, least]) / (most - least)
        latency = found[kind, least] - pace * least
        print(f"{kind}: {1e6 * latency:.0f} us and {1e-9 / pace:.2f} GB/s")
        for size in sizes[1:-1]:
            measured, predicted = found[kind, size], latency + pace * size
            print(f"  {size:>9,} bytes: {1e3 * measured:.3f} ms, {measured / predicted:.2f} of what was predicted")
    dist.destroy_process_group()


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        children = []
        for rank in range(2):
            pid = os.fork()
            if pid == 0:
                child(rank, os.path.join(folder, "store"))
                os._exit(0)
            children.append(pid)
        for pid in children:
            os.waitpid(pid, 0)
