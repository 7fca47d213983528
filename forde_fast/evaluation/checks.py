"""What comes in, checked and brought to the CPU."""

import numpy as np
import torch
from torch import Tensor

from forde_fast.validation import expect, finite, labels_in_range

_SUM_TOLERANCE = 1e-3  # on the sum of a row: float32 passes easily, bfloat16 and logits do not

Array = Tensor | np.ndarray


def as_probs(probs: Array, name: str, shape: str) -> Tensor:
    """`probs` on the CPU, checked: as many dimensions as `shape` has names, the last one a distribution."""
    known = isinstance(probs, Tensor | np.ndarray)
    expect(known, name, "a tensor or array", type(probs).__name__, error=TypeError)
    tensor = _to_cpu(probs)
    expect(tensor.is_floating_point(), name, "a floating dtype", probs.dtype, error=TypeError)
    rank = shape.count(",") + 1
    expect(tensor.ndim == rank, name, f"{rank} dimensions [{shape}]", f"shape {list(tensor.shape)}")
    expect(tensor.numel() > 0, name, f"at least one of each of {shape}", f"shape {list(tensor.shape)}")
    finite(tensor, name)
    low, high = (bound.item() for bound in tensor.aminmax())
    expect(low >= 0 and high <= 1 + _SUM_TOLERANCE, name, "values in [0, 1]", f"{low:g} to {high:g}")
    sums = tensor.double().sum(-1)
    worst = sums.flatten()[(sums - 1).abs().argmax()].item()
    normal = abs(worst - 1) <= _SUM_TOLERANCE
    expect(normal, name, f"rows summing to 1 within {_SUM_TOLERANCE}", f"a sum of {worst:g}")
    return tensor


def as_labels(labels: Array, samples: int, classes: int) -> Tensor:
    """`labels` on the CPU as int64 [samples], checked: integers in [0, classes)."""
    known = isinstance(labels, Tensor | np.ndarray)
    expect(known, "labels", "a tensor or array", type(labels).__name__, error=TypeError)
    tensor = _to_cpu(labels)
    labels_in_range(tensor, classes)
    expect(len(tensor) == samples, "labels", f"B = {samples} as the probabilities", f"B = {len(tensor)}")
    return tensor.long()


def _to_cpu(array: Array) -> Tensor:
    # a copy in C order: torch takes neither negative strides nor, silently, a read-only array
    return array.detach().cpu() if isinstance(array, Tensor) else torch.from_numpy(np.array(array, order="C"))


def as_numbers(values: Array, name: str, shape: str) -> Tensor:
    """`values` on the CPU in float64, checked: finite numbers with as many dimensions as `shape` has names."""
    known = isinstance(values, Tensor | np.ndarray)
    expect(known, name, "a tensor or array", type(values).__name__, error=TypeError)
    tensor = _to_cpu(values)
    expect(not tensor.is_complex(), name, "real numbers", tensor.dtype, error=TypeError)
    rank = shape.count(",") + 1
    expect(tensor.ndim == rank, name, f"{rank} dimensions [{shape}]", f"shape {list(tensor.shape)}")
    expect(tensor.numel() > 0, name, f"at least one of each of {shape}", f"shape {list(tensor.shape)}")
    tensor = tensor.double()
    finite(tensor, name)
    return tensor
