"""Small networks: a perceptron and a convolutional network, for grey images and for tests."""

from collections import OrderedDict
from math import prod

from torch import Tensor, nn

from forde_fast.models.init import check_in_shape, check_positive, haiku_init_


def mlp(
    num_classes: int = 10, in_shape: tuple[int, int, int] = (1, 28, 28), hidden: tuple[int, ...] = (128, 128)
) -> nn.Sequential:
    """Perceptron [B, C, H, W] -> logits [B, K]: Linear, BatchNorm, ReLU per hidden layer, then Linear `head`.

    The linear layers before a BatchNorm have no bias: the BatchNorm would take it away again.
    Raises ValueError for sizes below 1.
    """
    check_positive(num_classes=num_classes)
    check_in_shape(in_shape)
    layers = OrderedDict(flatten=nn.Flatten())
    width = prod(in_shape)
    for i, wider in enumerate(hidden):
        check_positive(hidden=wider)
        layers[f"linear{i}"] = nn.Linear(width, wider, bias=False)
        layers[f"norm{i}"] = nn.BatchNorm1d(wider)
        layers[f"relu{i}"] = nn.ReLU()
        width = wider
    layers["head"] = nn.Linear(width, num_classes)
    return haiku_init_(nn.Sequential(layers))


class Mean(nn.Module):
    """[B, C, H, W] -> [B, C]. AdaptiveAvgPool2d, of images in channels-last, has no rule under torch.vmap."""

    def forward(self, x: Tensor) -> Tensor:
        return x.mean((2, 3))


def cnn(num_classes: int = 10, in_channels: int = 1, width: int = 16) -> nn.Sequential:
    """Convolutional network [B, C, H, W] -> logits [B, K], for any H and W.

    Three 3x3 convolutions, each with BatchNorm and ReLU, of `width`, 2 `width` (stride 2) and 4 `width`
    (stride 2) channels, the mean over the image, then Linear `head`. Raises ValueError for sizes below 1.
    """
    check_positive(num_classes=num_classes, in_channels=in_channels, width=width)
    layers = OrderedDict()
    channels = in_channels
    for i, (wider, stride) in enumerate([(width, 1), (2 * width, 2), (4 * width, 2)]):
        layers[f"conv{i}"] = nn.Conv2d(channels, wider, 3, stride, padding=1, bias=False)
        layers[f"norm{i}"] = nn.BatchNorm2d(wider)
        layers[f"relu{i}"] = nn.ReLU()
        channels = wider
    layers["mean"] = Mean()
    layers["head"] = nn.Linear(channels, num_classes)
    model = haiku_init_(nn.Sequential(layers))
    model.channels_last = True  # works in either layout of images: see forde_fast.second_order.accelerate
    return model
