"""Layers whose second-order pass is fast, swapped into any model and out again."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import nn

from forde_fast.second_order import layers
from forde_fast.validation import expect

FAST: dict[type[nn.Module], type[nn.Module]] = {
    nn.BatchNorm1d: layers.FastBatchNorm1d,
    nn.BatchNorm2d: layers.FastBatchNorm2d,
    nn.BatchNorm3d: layers.FastBatchNorm3d,
    nn.Conv1d: layers.FastConv1d,
    nn.Conv2d: layers.FastConv2d,
    nn.Conv3d: layers.FastConv3d,
    nn.Sequential: layers.FastSequential,
}
PLAIN = {fast: plain for plain, fast in FAST.items()}
CANDIDATES = (nn.modules.batchnorm._NormBase, nn.modules.conv._ConvNd)


@dataclass(frozen=True)
class Acceleration:
    """What `accelerate` found, by the modules' names: swapped, name -> class; left, name -> why."""

    swapped: dict[str, str] = field(default_factory=dict)
    left: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        reasons = "".join(f"; left {name or 'the model'}: {why}" for name, why in self.left.items())
        return f"{len(self.swapped)} layers swapped{reasons}"


def accelerate(model: nn.Module, channels_last: bool | None = None) -> Acceleration:
    """Give the convolutions and batch normalisations of `model` fast first- and second-order passes, in place.

    Outputs and gradients stay the same up to rounding. Only the class of a layer changes, to a subclass of its own:
    parameters, state dict, hooks, modes, deepcopy and pickle are as before, and `decelerate` undoes it. Subclasses of
    the layers, layers whose forward was replaced, and convolutions with a padding other than zeros are left.

    channels_last  convolutions bring images to that layout, which is faster but fails where the model calls `view` on
                   them. None: where a model's attribute `channels_last` says so, as the models of this package do
    """
    expect(isinstance(model, nn.Module), "model", "a torch.nn.Module", type(model).__name__, TypeError)
    found = Acceleration()
    _visit(model, "", channels_last, found, set())
    return found


def _visit(module: nn.Module, name: str, channels_last: bool | None, found: Acceleration, seen: set[int]) -> None:
    if id(module) in seen:
        return
    seen.add(id(module))
    if channels_last is None and not isinstance(module, layers.Conv):
        channels_last = getattr(module, "channels_last", None)
    reason = _reason(module)
    if reason:
        found.left[name] = reason
    elif type(module) in FAST:
        module.__class__ = FAST[type(module)]
        if not isinstance(module, nn.Sequential):
            found.swapped[name] = type(module).__name__
    if isinstance(module, layers.Conv):
        module.channels_last = bool(channels_last)
    for child_name, child in module.named_children():
        _visit(child, f"{name}.{child_name}" if name else child_name, channels_last, found, seen)


def _reason(module: nn.Module) -> str:
    """Why a layer that might be swapped is not; empty for all others."""
    if type(module) in PLAIN or not (isinstance(module, CANDIDATES) or type(module) is nn.Sequential):
        return ""
    if type(module) not in FAST:
        return f"{type(module).__name__} is not a layer that is known here"
    if "forward" in vars(module):
        return "its forward was replaced"
    padding = getattr(module, "padding", 0), getattr(module, "padding_mode", "zeros")
    if isinstance(padding[0], str) or padding[1] != "zeros":
        return f"its padding is {padding[0]!r}, {padding[1]!r}"
    return ""


def decelerate(model: nn.Module) -> nn.Module:
    """Undo `accelerate`; returns the model."""
    for module in model.modules():
        if isinstance(module, layers.Conv):
            vars(module).pop("channels_last", None)
        module.__class__ = PLAIN.get(type(module), type(module))
    return model
