"""ResNet18 for small images, as in the published experiments."""

import torch
from torch import Tensor, nn

from forde_fast.models.init import check_positive, haiku_init_
from forde_fast.second_order import norm_relu


class BasicBlock(nn.Module):
    """relu(norm(conv(relu(norm(conv(x))))) + shortcut(x)); the shortcut is a 1x1 convolution with BatchNorm
    where the shape changes, else x itself."""

    def __init__(self, in_channels: int, channels: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(channels)
        self.shortcut = nn.Sequential()
        if stride != 1 or in_channels != channels:
            projection = nn.Conv2d(in_channels, channels, 1, stride, bias=False)
            self.shortcut = nn.Sequential(projection, nn.BatchNorm2d(channels))

    def forward(self, x: Tensor) -> Tensor:
        y = norm_relu(self.norm1, self.conv1(x))
        return norm_relu(self.norm2, self.conv2(y), self.shortcut(x))


class ResNet(nn.Module):
    """3x3 stem without pooling, four stages of two basic blocks (strides 1, 2, 2, 2; `width` times 1, 2, 4, 8
    channels), the mean over the image, Linear `head`."""

    channels_last = True  # works in either layout of images: see forde_fast.second_order.accelerate

    def __init__(self, width: int, num_classes: int, in_channels: int):
        super().__init__()
        self.conv = nn.Conv2d(in_channels, width, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(width)
        blocks = []
        channels = width
        for stage, stride in enumerate((1, 2, 2, 2)):
            wider = width * 2**stage
            blocks += [BasicBlock(channels, wider, stride), BasicBlock(wider, wider, 1)]
            channels = wider
        self.blocks = nn.Sequential(*blocks)
        self.head = nn.Linear(channels, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = norm_relu(self.norm, self.conv(x))
        return self.head(self.blocks(x).mean((2, 3)))


def resnet18(width: int = 64, num_classes: int = 10, in_channels: int = 3, zero_head: bool = False) -> ResNet:
    """ResNet18 for small images: [B, C, H, W] -> logits [B, K], for any H and W.

    11,173,962 parameters by default. `zero_head` starts the head's weights at zero as the published runs do:
    the logits and every input gradient are then zero at step 0. Padding is 1 on every side, where the
    published "SAME" of a strided layer pads an even side only at its end. BatchNorm momentum 0.1 (decay
    0.9), eps 1e-5.
    Raises ValueError for sizes below 1.
    """
    check_positive(width=width, num_classes=num_classes, in_channels=in_channels)
    model = haiku_init_(ResNet(width, num_classes, in_channels))
    if zero_head:
        with torch.no_grad():
            model.head.weight.zero_()
    return model
