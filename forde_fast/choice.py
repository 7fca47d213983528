"""Which strategy computes an ensemble's steps: the one asked for if it is possible, or the fastest by measurement."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from forde_fast import second_order
from forde_fast.ensemble import Ensemble
from forde_fast.guards import is_memory
from forde_fast.methods import Method
from forde_fast.modes import evaluation_mode
from forde_fast.step import Objective, gradient
from forde_fast.strategies import Graphs, Strategy, alike, random_state, set_random_state, small
from forde_fast.validation import reason_of

ROUNDS = 3  # of measurement, after one that warms up
WORTH = 0.9  # what is not faster than a loop by this factor is not worth another order of rounding

_measured: dict[tuple, dict[str, float]] = {}  # so that equal trainers in one process are computed alike


class Choice(NamedTuple):
    """A strategy; whether layers with a fast second-order pass go with it (None: the layers are not ours); why."""

    strategy: Strategy
    accelerate: bool | None
    report: str = ""


def choose(
    kind: str, strategy: Strategy, ensemble: Ensemble, objective: Objective, x: Tensor, y: Tensor, accelerate: bool
) -> Choice:
    """What to use for batches like x, y: `kind` in `strategy`, or "auto": the fastest that is possible and fits in
    memory. accelerate: whether the members' layers are, or with "auto" may be, fast ones of ours. The ensemble's
    numbers and torch's generators stay as they are; its layers are left as chosen.

    "auto" keeps to a loop for one member, for larger members without repulsion, and where members draw random
    numbers, so that a seed gives the same masks whatever is fastest. It tries PyTorch's own layers in the loop too
    (without repulsion on the CPU these alone): in a small network the fast ones may not pay.
    """
    reasons: list[str] = []
    repels = objective.repels(len(ensemble))
    if not repels:  # whatever it is without its weight, it is computed as the deep ensemble is
        objective = Objective(Method(None), loss=objective.loss)
    fast = accelerate and (repels or x.is_cuda or kind != "auto")  # in a loop
    candidates = {"loop": Choice(replace(strategy, kind="loop"), fast if accelerate else None)}
    tried = ("stacked", "streams") if x.is_cuda else ("stacked",)
    if len(ensemble) == 1 or not (repels or small(ensemble)):
        tried = ()
    for name in tried if kind == "auto" else (kind,):
        # only the CPU's fast layers know stacked members
        possible = Choice(replace(strategy, kind=name), not (x.is_cuda and name == "stacked") if accelerate else None)
        _layers(ensemble, possible)
        reason = why_not(possible.strategy, ensemble, objective, x, y)
        if (
            not reason
            and kind == "auto"
            and name == "stacked"
            and _draws(possible.strategy, ensemble, objective, x, y)
        ):
            reason = "the members draw random numbers, whose order would change"
        if reason:
            reasons.append(f"not {name}: {reason}")
        else:
            candidates[name] = possible
    if kind != "auto":
        best, report = (kind, kind) if kind in candidates else ("loop", "loop")
    else:
        if fast:
            candidates["loop, PyTorch's layers"] = Choice(candidates["loop"].strategy, False)
        best = report = "loop"
        if len(candidates) > 1:
            best, report = _fastest(candidates, ensemble, objective, x, y)
    _layers(ensemble, candidates[best])
    return candidates[best]._replace(report="; ".join([report, *reasons]))


def _fastest(candidates: dict[str, Choice], ensemble, objective, x, y) -> tuple[str, str]:
    key = (tuple(candidates.items()), repr(ensemble), x.shape, x.dtype, x.device, objective.method, objective.loss,
           objective.backend, type(objective.lengthscale), objective.repulsion_samples)  # fmt: skip
    if key not in _measured:
        _measured[key] = _measure(dict(candidates), ensemble, objective, x, y)
    times = _measured[key]
    if not times:  # nothing fits in memory
        return "loop", "loop"
    best = min(times, key=lambda name: times[name] * (WORTH if name == "loop" else 1))
    others = ", ".join(f"{name} {1e3 * t:.1f}" for name, t in times.items() if name != best)
    return best, f"{best}: {1e3 * times[best]:.1f} ms a step" + (f" ({others})" if others else "")


def _layers(ensemble: Ensemble, choice: Choice) -> None:
    """Swap the ensemble's layers as chosen."""
    if choice.accelerate is not None:
        (second_order.accelerate if choice.accelerate else second_order.decelerate)(ensemble)


def why_not(strategy: Strategy, ensemble: Ensemble, objective: Objective, x: Tensor, y: Tensor) -> str:
    """Why the members cannot be computed so; empty where they can."""
    if strategy.kind == "streams":
        return "" if x.is_cuda else "it needs a CUDA device"
    if strategy.kind != "stacked" or len(ensemble) == 1:
        return ""
    space = objective.method.space
    if space is not None and not hasattr(space, "stacked"):
        return f"the space {getattr(space, '__name__', type(space).__name__)} has no stacked form"
    same = ensemble.uniform and len({repr(member) for member in ensemble.members}) == 1
    if not same or not alike(ensemble):
        return "the members are not built alike"
    with unchanged(ensemble):
        try:
            gradient(ensemble, ensemble.flat, None, x, y, objective, strategy=strategy)
            with torch.enable_grad(), evaluation_mode(ensemble), _attention_as_in_training():
                given = ensemble, ensemble.flat, None, x, y, objective.loss
                own, together = (Graphs(*given, one).plain()[1] for one in (replace(strategy, kind="loop"), strategy))
        except Exception as error:  # whatever a module does that torch.vmap cannot
            return f"{type(error).__name__}: {reason_of(error)}"
    bound = 1e3 * torch.finfo(own.dtype if strategy.precision == "full" else torch.bfloat16).eps
    off = (together - own).norm() > bound * own.norm()
    return "the members' losses come out otherwise" if off else ""


@contextlib.contextmanager
def _attention_as_in_training() -> Iterator[None]:
    """torch's attention layers have another way in evaluation mode, which has no derivative."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


def _draws(strategy: Strategy, ensemble: Ensemble, objective: Objective, x: Tensor, y: Tensor) -> bool:
    """Whether a step draws random numbers."""
    with unchanged(ensemble):
        before = random_state(x.device)
        gradient(ensemble, ensemble.flat, None, x, y, objective, strategy=strategy)
        after = random_state(x.device)
    return any(not torch.equal(a, b) for a, b in zip(before, after, strict=True))


def _measure(candidates: dict[str, Choice], ensemble, objective, x, y) -> dict[str, float]:
    """Seconds of a step with each, the shortest of some rounds in which they take turns. What is out of memory, or
    slower by half in its first round, is left out of the rest."""
    times: dict[str, float] = {}
    with unchanged(ensemble):
        for number in range(1 + ROUNDS):
            for name in list(candidates):
                _layers(ensemble, candidates[name])
                begin = _now(x.device)
                try:
                    gradient(ensemble, ensemble.flat, None, x, y, objective, strategy=candidates[name].strategy)
                except Exception as error:
                    if not is_memory(error):
                        raise
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
def unchanged(ensemble: Ensemble) -> Iterator[None]:
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
