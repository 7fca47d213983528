"""Timing: ratios of things run in turn in one process, and rows appended to a CSV file."""

from __future__ import annotations

import csv
import datetime
import functools
import io
import math
import random
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import torch

from forde_fast.files import write
from forde_fast.info import info

FACTS = ("cpu", "gpu", "torch", "triton", "python")
FEWEST = 5  # rounds that every call takes part in


def interleaved(
    calls: dict[str, Callable[[], object]],
    rounds: int,
    device: str,
    cache: str | None = None,
    budget: float = math.inf,
) -> dict[str, list[float]]:
    """Seconds of each call in each round. The calls take turns, in an order drawn anew for each round: a disturbed
    moment hits all of them, and none always finds the caches as the same other one has left them.

    cache   on a GPU: "cold", with its level-2 cache full of something else, or "warm", just after the same call
    budget  a call that has used up so many seconds sits out the rounds after its fifth: NaN
    """
    for call in calls.values():  # compile, allocate, fill caches
        call(), call()
    times = {name: [] for name in calls}
    order = list(calls)
    draw = random.Random(0)
    for done in range(rounds):
        draw.shuffle(order)
        for name in order:
            spent = sum(t for t in times[name] if t == t)
            rests = done >= FEWEST and spent > budget
            times[name].append(math.nan if rests else seconds(calls[name], device, cache))
    return times


def seconds(call: Callable[[], object], device: str, cache: str | None = None) -> float:
    """One call: wall time on a CPU, the device's own time on a GPU."""
    if device == "cpu":
        start = time.perf_counter()
        call()
        return time.perf_counter() - start
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    if cache is not None:
        torch.cuda._sleep(200_000)  # about 0.1 ms in which the host launches the rest: no gap between the events
    if cache == "cold":
        _more_than_l2().sum()  # by reading: the call need not wait until written lines are back in memory
    elif cache == "warm":
        call()
    begin.record()
    call()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3


@functools.cache
def _more_than_l2() -> torch.Tensor:
    return torch.ones(torch.cuda.get_device_properties().L2_cache_size, device="cuda")  # 4 times as many bytes


def captured(call: Callable[[], object]) -> Callable[[], None]:
    """`call` as a CUDA graph: its kernels without the host's work. RuntimeError where it cannot be captured.

    What is returned keeps `call`, for the graph reads what only that may hold.
    """
    before, aside = torch.cuda.current_stream(), torch.cuda.Stream()
    aside.wait_stream(before)
    with torch.cuda.stream(aside):
        for _ in range(3):
            call()
    before.wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            call()
    finally:
        torch.cuda.set_stream(before)  # a failed capture leaves its own stream behind

    def replay(reads: Callable[[], object] = call) -> None:
        graph.replay()

    return replay


def quantiles(values: list[float]) -> tuple[float, float, float]:
    """20 %, median, 80 %; NaN does not count."""
    at = torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64)
    return tuple(torch.tensor(values, dtype=torch.float64).nanquantile(at).tolist())


def ratio(times: list[float], floor: list[float]) -> float:
    """Median of the rounds' ratios."""
    return quantiles([a / b for a, b in zip(times, floor, strict=True)])[1]


def append(name: str, rows: list[dict], folder: Path) -> Path:
    """Add rows to FOLDER/NAME.csv, each with the time, commit, hardware and versions. No row is ever changed; where
    the rows have a column more than the file, that is empty in the older ones."""
    facts = info()
    common = {"time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"), "commit": commit()}
    common |= {key: facts[key] for key in FACTS}
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.csv"
    older = read(path) if path.exists() else []
    new = [{**common, **row} for row in rows]
    columns = list(dict.fromkeys(key for row in older + new for key in row))
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, columns, restval="")
    writer.writeheader()
    writer.writerows(older + new)
    write(path, text.getvalue().encode())
    return path


def read(path: Path) -> list[dict[str, str]]:
    """The rows of a CSV file, oldest first."""
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def commit() -> str:
    """The commit that is measured, with + where the tree differs from it; unknown outside a checkout."""
    try:
        _git("ls-files", "--error-unmatch", "timing.py")  # a checkout of this project, not one around an installation
        head = _git("rev-parse", "--short", "HEAD")
        changed = _git("status", "--porcelain", "-uno", "--", ".", "../csrc", "../kernels")
        return head + ("+" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=Path(__file__).parent, capture_output=True, text=True, check=True)
    return done.stdout.strip()
