"""How many threads a network gets: small ones one, as several would only wait for each other."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from forde_fast.modes import evaluation_mode

# multiply-adds of a pass over a batch, a few milliseconds of one core: with less, every one of a step's hundreds of
# operations is shorter than a thread that is busy elsewhere keeps the others waiting (measured: two threads of a busy
# machine with two cores take 10 times as long as one)
ENOUGH = 1e8


def multiply_adds(module: nn.Module, x: Tensor) -> int:
    """Those of the layers' matrices and kernels in a forward pass on x, which leaves the module as it is."""
    found = 0

    def count(layer, inputs, output):
        nonlocal found
        found += output.numel() * layer.weight[0].numel()

    layers = [layer for layer in module.modules() if isinstance(getattr(layer, "weight", None), Tensor)]
    hooks = [layer.register_forward_hook(count) for layer in layers if layer.weight.ndim > 1]
    try:
        with torch.no_grad(), evaluation_mode(module):
            module(x)
    finally:
        for hook in hooks:
            hook.remove()
    return found


@contextlib.contextmanager
def suited(module: nn.Module, x: Tensor) -> Iterator[None]:
    """Meanwhile one thread where a module has little to do on x; afterwards as many as before."""
    before = torch.get_num_threads()
    if multiply_adds(module, x) < ENOUGH:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
