"""Checks of what comes in: one line that names the argument, what was expected and what came."""

import difflib
import math
import numbers
from typing import NoReturn

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.float64, torch.bfloat16)


class NotFinite(ValueError):
    """Numbers that are not finite, and where."""


LONGEST = 400  # characters of what was expected, and of what came: either may quote a file of any content


def expect(holds: bool, name: str, expected: str, got, error: type[Exception] = ValueError) -> None:
    """Raise `error` in the one form that every message of the package has."""
    if not holds:
        refuse(name, expected, got, error)


def refuse(name: str, expected: str, got, error: type[Exception] = ValueError) -> NoReturn:
    """Raise what `expect` would: for checks at every call, where composing a message costs more than the check."""
    expected, got = (text if len(text) <= LONGEST else text[:LONGEST] + "..." for text in (expected, str(got)))
    raise error(_shown(f"{name}: expected {expected}, got {got}"))


def reason_of(error: Exception, most: int = 200) -> str:
    """What an error says, in one line: it may quote a file of any content."""
    return _shown(" ".join(str(error).split())[:most] or type(error).__name__)


def _shown(text: str) -> str:
    return "".join(c if c.isprintable() else "?" for c in text)


def one_of(value: str, name: str, valid) -> str:
    """`value`, if it is one of the names in `valid`; the message lists them and asks for one that is alike."""
    if not (isinstance(value, str) and value in valid):
        refuse(name, "one of " + ", ".join(valid), repr(value)[:80] + meant(value, valid))
    return value


def meant(value, valid) -> str:
    """` (name?)`, the one most like `value`, or nothing where none is like it."""
    close = difflib.get_close_matches(value[:80], valid, 1) if isinstance(value, str) else []
    return f" ({close[0]}?)" if close else ""


def names_in(text: str) -> tuple[str, ...]:
    """The names in a list with commas, without the spaces around them."""
    return tuple(name.strip() for name in text.split(","))


def tensor_of_floats(tensor: Tensor, name: str, shape: str) -> None:
    """A floating tensor with as many dimensions as the names in `shape`, none of size 0."""
    if not isinstance(tensor, Tensor):
        refuse(name, "a torch.Tensor", type(tensor).__name__, TypeError)
    if tensor.dtype not in FLOATS:
        refuse(name, "float32, float64 or bfloat16", tensor.dtype, TypeError)
    if tensor.layout != torch.strided:
        refuse(name, "a dense tensor", tensor.layout, TypeError)
    rank = shape.count(",") + 1
    if tensor.ndim != rank:
        refuse(name, f"{rank} dimensions [{shape}]", f"shape {list(tensor.shape)}")
    if tensor.numel() == 0:
        refuse(name, "at least one of each of " + shape, f"shape {list(tensor.shape)}")


def particles_and_others(particles: Tensor, others: Tensor | None, dimension: int | None) -> None:
    """Particles [M, G, D], others [N, G, D] like them, and D as the lengthscale has it (None: any)."""
    tensor_of_floats(particles, "particles", "M, G, D")
    if others is not None:
        tensor_of_floats(others, "others", "N, G, D")
        expect(others.dtype == particles.dtype, "others", f"dtype {particles.dtype} as particles", others.dtype)
        expect(others.device == particles.device, "others", f"device {particles.device}", others.device)
        expect(
            others.shape[1:] == particles.shape[1:],
            "others",
            f"shape [N, {particles.shape[1]}, {particles.shape[2]}] as particles",
            list(others.shape),
        )
    if dimension is not None:
        expect(
            particles.shape[2] == dimension,
            "particles",
            f"D = {dimension} as the lengthscale",
            particles.shape[2],
        )


def finite(tensor: Tensor, name: str) -> None:
    """No NaN and no infinity; the message says where the first one is."""
    if math.isfinite(tensor.sum()):  # one pass; a sum may overflow where no number is infinite
        return
    bad = ~torch.isfinite(tensor)
    if bad.any():
        raise NotFinite(
            f"{name}: expected finite numbers, got {tensor[bad][0].item()} at {bad.nonzero()[0].tolist()}"
        )


def no_tangent(tensor: Tensor, name: str) -> None:
    """RuntimeError where a forward-mode derivative is asked for, which would come out as 0."""
    forward = torch.autograd.forward_ad
    if torch.compiler.is_compiling() or forward._current_level < 0:
        return
    if forward.unpack_dual(tensor).tangent is not None:
        refuse(name, "no forward-mode derivative, which the value has not", "a dual tensor", RuntimeError)


def lengthscale(value) -> None:
    """None or a lengthscale: an object with `coordinates` and `product`."""
    if not (value is None or (hasattr(value, "coordinates") and hasattr(value, "product"))):
        expected = "None or a lengthscale such as Identity() or PCA.fit(images)"
        refuse("lengthscale", expected, type(value).__name__, TypeError)


def positive(value: float, name: str, allow_zero: bool = False) -> None:
    # a float is known at once, other numbers by asking their classes
    number = isinstance(value, (float, numbers.Real)) and not isinstance(value, bool)
    good = number and (value >= 0 if allow_zero else value > 0) and value < float("inf")
    if not good:
        refuse(name, "a finite number " + (">= 0" if allow_zero else "> 0"), repr(value))


def truth(value: bool, name: str) -> None:
    if not isinstance(value, bool):
        refuse(name, "True or False", repr(value)[:80], TypeError)


def whole(value: int, name: str, least: int = 1) -> None:
    good = isinstance(value, numbers.Integral) and not isinstance(value, bool) and value >= least
    expect(good, name, f"a whole number >= {least}", repr(value))


def labels_in_range(labels: Tensor, classes: int, name: str = "labels") -> None:
    """Integer labels [B] in [0, classes)."""
    expect(isinstance(labels, Tensor), name, "a torch.Tensor", type(labels).__name__, TypeError)
    integer = not (labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool)
    expect(integer, name, "an integer tensor", labels.dtype, TypeError)
    expect(labels.ndim == 1, name, "1 dimension [B]", f"shape {list(labels.shape)}")
    # as int64: torch finds no extremes of wider unsigned ones, and those that become negative are too large anyway
    low, high = (int(v) for v in torch.aminmax(labels.long())) if labels.numel() else (0, 0)
    expect(low >= 0 and high < classes, name, f"values from 0 to {classes - 1}", f"values from {low} to {high}")
