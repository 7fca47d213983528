"""Timing for the benchmarks: ratios of things run in turn in one process; rows appended to results/*.csv."""

from __future__ import annotations

import argparse
import csv
import datetime
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import torch

from forde_fast.info import info

RESULTS = Path(__file__).parent / "results"
FACTS = ("cpu", "gpu", "torch", "triton", "python")


def options(description: str, rounds: int) -> argparse.Namespace:
    """--device, --rounds and --out, as every benchmark has them."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cpu", "cuda"))
    parser.add_argument("--rounds", type=int, default=rounds)
    parser.add_argument("--out", type=Path, default=RESULTS, help="the folder of the CSV file")
    return parser.parse_args()


def seconds(call: Callable[[], object], device: str) -> float:
    """One call: wall time on a CPU, the device's own time on a GPU."""
    if device == "cpu":
        start = time.perf_counter()
        call()
        return time.perf_counter() - start
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    call()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3


def interleaved(calls: dict[str, Callable[[], object]], rounds: int, device: str) -> dict[str, list[float]]:
    """Seconds of each call in each round: the calls take turns, so that a disturbed moment hits all of them."""
    for call in calls.values():  # compile, allocate, fill caches
        call(), call()
    times = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            times[name].append(seconds(call, device))
    return times


def quantiles(values: list[float]) -> tuple[float, float, float]:
    """20 %, median, 80 %."""
    return tuple(torch.tensor(values, dtype=torch.float64).quantile(torch.tensor([0.2, 0.5, 0.8]).double()).tolist())


def ratio(times: list[float], floor: list[float]) -> float:
    """Median of the rounds' ratios."""
    return quantiles([a / b for a, b in zip(times, floor, strict=True)])[1]


def append(name: str, rows: list[dict], folder: Path = RESULTS) -> Path:
    """Add rows to results/NAME.csv, each with the time, commit, hardware and versions."""
    facts = info()
    common = {"time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"), "commit": commit()}
    common |= {key: facts[key] for key in FACTS}
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.csv"
    new = not path.exists()
    with open(path, "a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [*common, *rows[0]])
        if new:
            writer.writeheader()
        writer.writerows({**common, **row} for row in rows)
    return path


def commit() -> str:
    """The commit that is measured, with + where the tree differs from it; unknown outside a checkout."""
    try:
        head = _git("rev-parse", "--short", "HEAD")
        changed = _git("status", "--porcelain", "-uno", "--", "../forde_fast", "../csrc", "../kernels")
        return head + ("+" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=Path(__file__).parent, capture_output=True, text=True, check=True)
    return done.stdout.strip()
