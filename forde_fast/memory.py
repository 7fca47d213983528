"""How many members' graphs fit into a memory budget, by what their steps are seen to take."""

from __future__ import annotations

import weakref
from dataclasses import replace

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from forde_fast.choice import unchanged
from forde_fast.ensemble import Ensemble
from forde_fast.step import Objective, gradient
from forde_fast.strategies import Strategy
from forde_fast.validation import expect


class Peak(TorchDispatchMode):
    """As a context: `bytes`, the most that the tensors made in it took at a time."""

    def __init__(self):
        super().__init__()
        self.bytes = self.now = 0
        self.alive: set[int] = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        given = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        for t in tree_leaves(out):
            storage = t.untyped_storage() if isinstance(t, Tensor) else None
            if storage is None or storage._cdata in given or storage._cdata in self.alive:
                continue
            self.alive.add(storage._cdata)
            self.now += storage.nbytes()
            self.bytes = max(self.bytes, self.now)
            weakref.finalize(storage, self._freed, storage._cdata, storage.nbytes())
        return out

    def _freed(self, storage: int, size: int) -> None:
        self.alive.discard(storage)
        self.now -= size


def peak(strategy: Strategy, ensemble: Ensemble, objective: Objective, x: Tensor, y: Tensor) -> int:
    """Bytes of tensors that the gradient of a step takes beyond what is there before; the ensemble and torch's
    generators stay as they are."""
    with unchanged(ensemble), Peak() as seen:
        gradient(ensemble, ensemble.flat, None, x, y, objective, True, strategy)
    return seen.bytes


def within(
    budget: int | None, strategy: Strategy, ensemble: Ensemble, objective: Objective, x: Tensor, y: Tensor
) -> Strategy:
    """The strategy with as many members at a time as keep a step on batches like x, y within `budget` bytes.

    Raises ValueError if a single one does not.
    """
    if budget is None:
        return strategy

    def needs(members: int) -> int:
        return peak(replace(strategy, members_at_a_time=members), ensemble, objective, x, y)

    one = needs(1)
    what = f"at least the {one:,} bytes that a step takes with one member's graph at a time"
    expect(one <= budget, "memory_budget", what, f"{budget:,}")
    if len(ensemble) == 1:
        return strategy
    each = max(1, needs(2) - one)
    members = min(len(ensemble), 1 + (budget - one) // each)
    while members > 1 and needs(members) > budget:
        members -= 1
    return replace(strategy, members_at_a_time=members)
