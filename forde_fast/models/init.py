"""What the models share: the published initialisation and the check of their sizes."""

import torch
from torch import nn

from forde_fast.validation import expect, whole


@torch.no_grad()
def haiku_init_(module: nn.Module) -> nn.Module:
    """Initialise the convolutions, linear layers and BatchNorms of `module` in place; returns it.

    Haiku's defaults, with which the published ResNets were trained (hk.Conv2D and hk.Linear without w_init):
    weights from a normal of deviation 1/sqrt(fan_in) cut off at two deviations, biases 0, BatchNorm scale 1
    and offset 0. The draws' own deviation is therefore 0.8796/sqrt(fan_in): only Haiku's VarianceScaling,
    which the published models do not use, divides that factor out. Draws from torch's global generator.
    """
    for layer in module.modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            sigma = layer.weight[0].numel() ** -0.5
            nn.init.trunc_normal_(layer.weight, std=sigma, a=-2 * sigma, b=2 * sigma)
            if layer.bias is not None:
                layer.bias.zero_()
        elif isinstance(layer, nn.BatchNorm1d | nn.BatchNorm2d):
            layer.reset_parameters()
    return module


def check_positive(**sizes: int) -> None:
    """Raise ValueError naming the first argument that is no whole number of at least 1."""
    for name, size in sizes.items():
        whole(size, name)


def check_in_shape(in_shape: tuple[int, int, int]) -> None:
    """Raise ValueError unless in_shape is (C, H, W), each at least 1."""
    expect(isinstance(in_shape, tuple | list) and len(in_shape) == 3, "in_shape", "(C, H, W)", repr(in_shape))
    for size in in_shape:
        whole(size, "in_shape")
