"""Images read once, batch by batch, checked."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from torch import Tensor

from forde_fast import validation
from forde_fast.validation import expect

CHUNK = 2**24  # numbers that are converted to float64 at a time: 128 MiB


def chunks(images: Tensor | Iterable) -> Iterator[Tensor]:
    """The images [n, ...] in float64, a part at a time, from one tensor or from batches, alone or with labels.

    Raises TypeError or ValueError for what is no batch of floats, not finite, of another shape than the first, or
    for less than two images in all.
    """
    expect(isinstance(images, Iterable), "images", "a tensor or batches", type(images).__name__, TypeError)
    count, shape = 0, None
    for batch in [images] if isinstance(images, Tensor) else images:
        rows = batch[0] if isinstance(batch, (tuple, list)) else batch
        expect(isinstance(rows, Tensor), "images", "tensors", type(rows).__name__, TypeError)
        expect(rows.is_floating_point(), "images", "floats, as the model receives them", rows.dtype, TypeError)
        shaped = rows.ndim >= 2 and rows.numel() > 0
        expect(shaped, "images", "[N, ...] with two dimensions or more, none empty", f"shape {list(rows.shape)}")
        shape = rows.shape[1:] if shape is None else shape
        same = rows.shape[1:] == shape
        expect(same, "images", f"shape {list(shape)} each, as in the first batch", list(rows.shape[1:]))
        validation.finite(rows, "images")
        count += len(rows)
        for part in rows.detach().split(max(1, CHUNK // shape.numel())):
            yield part.double()
    expect(count >= 2, "images", "at least 2", count)
