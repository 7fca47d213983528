"""What a training is given: batches, checked before any work, and read from a loader that may fail."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from forde_fast import guards, validation
from forde_fast.ensemble import Ensemble, untouched
from forde_fast.modes import evaluation_mode
from forde_fast.spaces import InputGradients
from forde_fast.step import Objective
from forde_fast.validation import expect, reason_of


class Check:
    """Raises a ValueError or TypeError that names what is odd in a batch x [B, ...], y [B]. On a GPU the numbers are
    looked at once for each shape of sample."""

    def __init__(self, ensemble: Ensemble):
        self.ensemble = ensemble
        self.shape: torch.Size | None = None  # of the samples that the members were tried on
        self.classes: int | None = None

    def __call__(self, x: Tensor, y: Tensor, objective: Objective) -> None:
        flat = self.ensemble.flat
        expect(isinstance(x, Tensor), "x", "a torch.Tensor", type(x).__name__, TypeError)
        validation.tensor_of_floats(x, "x", ", ".join(["B"] + ["..."] * max(x.ndim - 1, 1)))
        expect(x.dtype == flat.dtype, "x", f"dtype {flat.dtype}, as the members", x.dtype, TypeError)
        expect(x.device == flat.device, "x", f"device {flat.device}, as the members", x.device)
        expect(isinstance(y, Tensor), "y", "a torch.Tensor", type(y).__name__, TypeError)
        expect(y.shape[:1] == x.shape[:1], "y", f"{len(x)} of them, one per sample", list(y.shape))
        expect(y.device == x.device, "y", f"device {x.device}, as x", y.device)
        space, size = objective.method.space, math.prod(x.shape[1:])
        by_input = isinstance(space, InputGradients)
        dimension = getattr(objective.lengthscale, "dimension", None) if by_input else None
        expect(dimension in (None, size), "x", f"{dimension} values per sample, as the lengthscale", size)
        if self.shape != x.shape[1:]:
            with torch.no_grad(), evaluation_mode(self.ensemble), untouched(x):
                self.classes = self.ensemble(x).shape[-1]
            self.shape = x.shape[1:]
        elif x.is_cuda:
            return  # values are looked at once: each look would wait for the device
        validation.finite(x.detach(), "x")
        soft = y.is_floating_point() and y.ndim > 1
        indexed = by_input and not callable(space.score)
        if indexed or (objective.loss is F.cross_entropy and not soft):
            validation.labels_in_range(y, self.classes, "y")
            expect(y.dtype == torch.int64, "y", "dtype torch.int64", y.dtype, TypeError)


def read(batches: Iterator, epoch: int, batch: int) -> Iterator[tuple[Tensor, Tensor]]:
    """The batches, and where they stop coming, one error that says where."""
    while True:
        where = f"epoch {epoch}, batch {batch}"
        try:
            given = next(batches)
        except StopIteration:
            return
        except Exception as error:
            if guards.is_memory(error):  # which has an answer of its own
                raise
            reason = f"{type(error).__name__}: {reason_of(error)}"
            raise RuntimeError(f"loader: expected a batch (x, y) in {where}, got {reason}") from error
        kinds = [type(part).__name__ for part in given] if isinstance(given, (tuple, list)) else type(given).__name__
        pair = isinstance(kinds, list) and len(kinds) == 2 and all(isinstance(part, Tensor) for part in given)
        expect(pair, "loader", f"a batch (x, y) of two tensors in {where}", kinds, TypeError)
        yield tuple(given)
        batch += 1
