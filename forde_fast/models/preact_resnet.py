"""PreActResNet18 for small images, as in the published experiments on TinyImageNet."""

import torch
from torch import Tensor, nn

from forde_fast.models.init import check_positive, haiku_init_
from forde_fast.second_order import norm_relu


class PreActBlock(nn.Module):
    """With a = relu(norm(x)): conv(relu(norm(conv(a)))) + shortcut (He et al. 2016, "Identity mappings"). The
    shortcut is a 1x1 convolution of a where the shape changes, else x itself."""

    def __init__(self, in_channels: int, channels: int, stride: int):
        super().__init__()
        self.norm1 = nn.BatchNorm2d(in_channels)
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.shortcut = None
        if stride != 1 or in_channels != channels:
            self.shortcut = nn.Conv2d(in_channels, channels, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        a = norm_relu(self.norm1, x)
        y = self.conv2(norm_relu(self.norm2, self.conv1(a)))
        return y + (x if self.shortcut is None else self.shortcut(a))


class PreActResNet(nn.Module):
    """3x3 stem without pooling, four stages of two blocks (strides 1, 2, 2, 2; `width` times 1, 2, 4, 8 channels),
    BatchNorm and ReLU, the mean over the image, Linear `head`."""

    channels_last = True  # works in either layout of images: see forde_fast.second_order.accelerate

    def __init__(self, width: int, num_classes: int, in_channels: int):
        super().__init__()
        self.conv = nn.Conv2d(in_channels, width, 3, padding=1, bias=False)
        blocks = []
        channels = width
        for stage, stride in enumerate((1, 2, 2, 2)):
            wider = width * 2**stage
            blocks += [PreActBlock(channels, wider, stride), PreActBlock(wider, wider, 1)]
            channels = wider
        self.blocks = nn.Sequential(*blocks)
        self.norm = nn.BatchNorm2d(channels)
        self.head = nn.Linear(channels, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(norm_relu(self.norm, self.blocks(self.conv(x))).mean((2, 3)))


def preactresnet18(
    width: int = 64, num_classes: int = 200, in_channels: int = 3, zero_head: bool = False
) -> PreActResNet:
    """PreActResNet18 for small images: [B, C, H, W] -> logits [B, K], for any H and W.

    11,269,640 parameters by default. `zero_head` and BatchNorm as in `resnet18`. Raises ValueError for sizes below 1.
    """
    check_positive(width=width, num_classes=num_classes, in_channels=in_channels)
    model = haiku_init_(PreActResNet(width, num_classes, in_channels))
    if zero_head:
        with torch.no_grad():
            model.head.weight.zero_()
    return model
