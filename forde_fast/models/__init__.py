"""Networks: images [B, C, H, W] -> logits [B, K], each with its last linear layer as `head`."""

from torch import nn

from forde_fast.models.init import check_in_shape, check_positive, haiku_init_
from forde_fast.models.preact_resnet import preactresnet18
from forde_fast.models.resnet import resnet18
from forde_fast.models.small import cnn, mlp
from forde_fast.validation import one_of

__all__ = ["MODELS", "cnn", "haiku_init_", "make", "mlp", "preactresnet18", "resnet18"]


def _mlp(num_classes, in_shape, width=128):
    return mlp(num_classes, in_shape, hidden=(width, width))


def _cnn(num_classes, in_shape, width=16):
    return cnn(num_classes, in_shape[0], width)


def _resnet18(num_classes, in_shape, width=64):
    return resnet18(width, num_classes, in_shape[0])


def _preactresnet18(num_classes, in_shape, width=64):
    return preactresnet18(width, num_classes, in_shape[0])


# name -> builder(num_classes=, in_shape=(C, H, W), width=): the names of the command line
MODELS = {"mlp": _mlp, "cnn": _cnn, "resnet18": _resnet18, "preactresnet18": _preactresnet18}


def make(name: str, num_classes: int, in_shape: tuple[int, int, int], width: int | None = None) -> nn.Module:
    """Build the model called `name` for images of in_shape (C, H, W); width None is the model's own.

    Raises ValueError for an unknown name (it lists the names) and for sizes below 1.
    """
    one_of(name, "name", MODELS)
    check_in_shape(in_shape)
    if width is None:
        return MODELS[name](num_classes=num_classes, in_shape=in_shape)
    check_positive(width=width)
    return MODELS[name](num_classes=num_classes, in_shape=in_shape, width=width)
