"""What comes in, checked and brought to the CPU."""

import numpy as np
import torch
from torch import Tensor

from forde_fast.validation import expect, finite, labels_in_range, refuse

_SUM_TOLERANCE = 1e-3  # on the sum of a row: float32 passes easily, bfloat16 and logits do not

Array = Tensor | np.ndarray


def as_probs(probs: Array, name: str, shape: str) -> Tensor:
    """`probs` on the CPU, checked: as many dimensions as `shape` has names, the last one a distribution."""
    tensor = _to_cpu(probs, name)
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
    tensor = _to_cpu(labels, "labels")
    labels_in_range(tensor, classes)
    expect(len(tensor) == samples, "labels", f"B = {samples} as the probabilities", f"B = {len(tensor)}")
    return tensor.long()


def _to_cpu(array: Array, name: str) -> Tensor:
    if isinstance(array, Tensor):
        return array.detach().cpu()
    expect(isinstance(array, np.ndarray), name, "a tensor or array", type(array).__name__, error=TypeError)
    # a copy in C order and native bytes: torch takes neither negative strides nor, silently, a read-only array
    own = np.array(array, dtype=array.dtype.newbyteorder("="), order="C")
    try:
        return torch.from_numpy(own)
    except TypeError:
        refuse(name, "a dtype that torch has", array.dtype, TypeError)


def as_numbers(values: Array, name: str, shape: str) -> Tensor:
    """`values` on the CPU in float64, checked: finite numbers with as many dimensions as `shape` has names."""
    tensor = _to_cpu(values, name)
    expect(not tensor.is_complex(), name, "real numbers", tensor.dtype, error=TypeError)
    rank = shape.count(",") + 1
    expect(tensor.ndim == rank, name, f"{rank} dimensions [{shape}]", f"shape {list(tensor.shape)}")
    expect(tensor.numel() > 0, name, f"at least one of each of {shape}", f"shape {list(tensor.shape)}")
    tensor = tensor.double()
    finite(tensor, name)
    return tensor
