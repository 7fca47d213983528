"""Which strategy computes an ensemble's steps: the one asked for if it is possible, or the fastest by measurement."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from forde_fast.ensemble import Ensemble, evaluation_mode
from forde_fast.step import Objective, gradient
from forde_fast.strategies import Graphs, Strategy, alike, random_state, set_random_state

ROUNDS = 3  # of measurement, after one that warms up
WORTH = 0.9  # what is not faster than a loop by this factor is not worth another order of rounding

_measured: dict[tuple, dict[str, float]] = {}  # so that equal trainers in one process are computed alike


def choose(
    kind: str, strategy: Strategy, ensemble: Ensemble, objective: Objective, x: Tensor, y: Tensor
) -> tuple[Strategy, str]:
    """The strategy for batches like x, y, and why: `kind` in it, or "auto". The ensemble and torch's generators
    stay as they are.

    "auto" takes a loop where there is no repulsion (members are then M plain training loops, bit for bit) and
    where members draw random numbers (so that a seed gives the same masks whatever is fastest); else the fastest
    of those that are possible and fit in memory.
    """
    loop, reasons = replace(strategy, kind="loop"), []
    if kind == "loop" or len(ensemble) == 1:
        return loop, "loop" if kind == "loop" else "loop: one member"
    if kind == "auto" and not objective.repels(len(ensemble)):
        return loop, "loop: without repulsion members are plain training loops"
    candidates = {}
    for name in ("stacked", "streams") if kind == "auto" else (kind,):
        reason = why_not(name, replace(strategy, kind=name), ensemble, objective, x, y)
        if reason:
            reasons.append(f"not {name}: {reason}")
        else:
            candidates[name] = replace(strategy, kind=name)
    if kind != "auto":
        return (candidates[kind], kind) if candidates else (loop, f"loop: {reasons[0]}")
    if "stacked" in candidates and _draws(loop, ensemble, objective, x, y):
        del candidates["stacked"]
        reasons.append("not stacked: the members draw random numbers, whose order would change")
    key = (loop, tuple(candidates), repr(ensemble), x.shape, x.dtype, x.device, objective.method, objective.loss,
           objective.backend, type(objective.lengthscale), objective.repulsion_samples)  # fmt: skip
    if candidates and key not in _measured:
        _measured[key] = _measure({"loop": loop, **candidates}, ensemble, objective, x, y)
    times = _measured.get(key)
    if not times:
        return loop, "; ".join(["loop", *reasons])
    best = min(times, key=lambda name: times[name] * (1 if name == "loop" else 1 / WORTH))
    others = ", ".join(f"{name} {1e3 * t:.1f} ms" for name, t in times.items() if name != best)
    return candidates.get(best, loop), "; ".join([f"{best}: {1e3 * times[best]:.1f} ms a step, {others}", *reasons])


def why_not(kind: str, strategy: Strategy, ensemble: Ensemble, objective: Objective, x: Tensor, y: Tensor) -> str:
    """Why the members cannot be computed so; empty where they can."""
    if kind == "streams":
        return "" if x.is_cuda else "it needs a CUDA device"
    if kind != "stacked":
        return ""
    space = objective.method.space
    if space is not None and not hasattr(space, "stacked"):
        return f"the space {getattr(space, '__name__', type(space).__name__)} has no stacked form"
    same = ensemble.uniform and len({repr(member) for member in ensemble.members}) == 1
    if not same or not alike(ensemble):
        return "the members are not built alike"
    with _unchanged(ensemble):
        try:
            gradient(ensemble, ensemble.flat, None, x, y, objective, strategy=strategy)
            with torch.enable_grad(), evaluation_mode(ensemble):
                given = ensemble, ensemble.flat, None, x, y, objective.loss
                own, together = (Graphs(*given, one).plain()[1] for one in (replace(strategy, kind="loop"), strategy))
        except Exception as error:  # whatever a module does that torch.vmap cannot
            return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    bound = 1e3 * torch.finfo(own.dtype if strategy.precision == "full" else torch.bfloat16).eps
    off = (together - own).norm() > bound * own.norm()
    return "the members' losses come out otherwise" if off else ""


def _draws(strategy: Strategy, ensemble: Ensemble, objective: Objective, x: Tensor, y: Tensor) -> bool:
    """Whether a step draws random numbers."""
    with _unchanged(ensemble):
        before = random_state(x.device)
        gradient(ensemble, ensemble.flat, None, x, y, objective, strategy=strategy)
        after = random_state(x.device)
    return any(not torch.equal(a, b) for a, b in zip(before, after, strict=True))


def _measure(candidates: dict[str, Strategy], ensemble, objective, x, y) -> dict[str, float]:
    """Seconds of a step with each, the shortest of some rounds in which they take turns. What is out of memory, or
    slower by half in its first round, is left out of the rest."""
    times: dict[str, float] = {}
    with _unchanged(ensemble):
        for number in range(1 + ROUNDS):
            for name in list(candidates):
                begin = _now(x.device)
                try:
                    gradient(ensemble, ensemble.flat, None, x, y, objective, strategy=candidates[name])
                except torch.OutOfMemoryError:
                    del candidates[name]
                    times.pop(name, None)
                    continue
                if number:
                    times[name] = min(times.get(name, float("inf")), _now(x.device) - begin)
            for name in list(candidates):
                if number and times[name] > 1.5 * min(times.values()):
                    del candidates[name]
    return times


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


@contextlib.contextmanager
def _unchanged(ensemble: Ensemble) -> Iterator[None]:
    """What happens in here to the buffers and torch's generators is undone."""
    device = ensemble.flat.device
    buffers, random = [(b, b.clone()) for b in ensemble.buffers()], random_state(device)
    try:
        yield
    finally:
        with torch.no_grad():
            for b, before in buffers:
                b.copy_(before)
        set_random_state(random, device)
