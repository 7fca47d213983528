"""Where the ranks of one start meet, and part."""

from __future__ import annotations

import os
import time
import uuid

import torch.distributed as dist

PATIENCE = 1800.0  # seconds, as gloo's own
PAUSE = 0.01


def join(backend: str) -> None:
    """torch.distributed's default group, from what torchrun set; at a `fresh` store where its agent keeps one."""
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return dist.init_process_group(backend)
    rank, ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    kept = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False)
    return dist.init_process_group(backend, store=fresh(kept, rank, ranks), rank=rank, world_size=ranks)


def part() -> None:
    """End the group, if there is one, when all ranks have left. A process that ends before gloo's threads do is now
    and then aborted, as they still hold Python's tensors (pytorch's pull request 179291)."""
    if dist.is_initialized():
        dist.destroy_process_group()


def fresh(kept: dist.Store, rank: int, ranks: int) -> dist.Store:
    """A part of the store in which nobody has written; all ranks of one start call this and are given the same one.

    torchrun's agent keeps its store over restarts, with the addresses of processes that are gone: a rank that reads
    one before it is overwritten waits for a connection that never comes (pytorch's issue 135712). Agents count
    restarts each for itself, so that no number tells one start from another. Instead every rank draws a name; rank 0
    answers to it with its own, and a rank knows by the name it drew that the answer is of now.
    """
    own, late = uuid.uuid4().hex, time.monotonic() + PATIENCE
    kept = dist.PrefixStore("forde_fast", kept)

    def found(key: str) -> str:
        return kept.get(key).decode() if kept.check([key]) else ""

    def pause() -> None:
        if time.monotonic() > late:
            raise RuntimeError(f"gloo: the other ranks did not come within {PATIENCE:.0f} s")
        time.sleep(PAUSE)

    if rank:
        kept.set(f"{rank}/drawn", own)
        while not (answer := found(f"{rank}/answer")).startswith(own):
            pause()
        name = answer.removeprefix(own)
        kept.set(f"{rank}/heard", name)
        return dist.PrefixStore(name, kept)
    waiting = set(range(1, ranks))
    while waiting := {other for other in waiting if found(f"{other}/heard") != own}:
        for other in waiting:
            kept.set(f"{other}/answer", found(f"{other}/drawn") + own)
        pause()
    return dist.PrefixStore(own, kept)
