"""Float32 matrix products on CUDA, in a precision that is asked for by name. Other tensors have but one.

Where the rows' size is known beforehand, factors in float16 do what tf32 does: both keep 11 bits, but products of
float16 are twice as fast and read half as much. Their results are in float32 as well.
"""

import contextlib
import functools
import math
import operator
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from forde_fast.operators import library

# tf32 keeps 11 of 24 bits of every factor, which costs little here, for the rows are differences; tf32x3 splits the
# factors into two such parts and leaves out the product of the lower ones; ieee keeps all and is far slower
PRECISIONS = ("tf32", "tf32x3", "ieee")

library.define("matmul(Tensor a, Tensor b, str precision) -> Tensor")


def outside_autocast(call: Callable) -> Callable:
    """`call`, whose products have the precision that is asked of them under the caller's autocast too."""

    @functools.wraps(call)
    def run(*arguments, **named):
        if not (torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda")):  # told soonest
            return call(*arguments, **named)
        given = (*arguments, *named.values())
        device = next((x.device.type for x in given if isinstance(x, Tensor)), "cpu")
        if device not in ("cpu", "cuda") or not torch.is_autocast_enabled(device):
            return call(*arguments, **named)
        with torch.autocast(device, enabled=False):
            return call(*arguments, **named)

    return run


def outside_inference(call: Callable) -> Callable:
    """`call` of the oracle, which differentiates: autograd keeps nothing that torch.inference_mode has made."""

    def run(*arguments):
        with torch.inference_mode(False):
            return call(*(x.clone() if isinstance(x, Tensor) and x.is_inference() else x for x in arguments))

    return run


def matmul(a: Tensor, b: Tensor, precision: str) -> Tensor:
    """a [..., K] @ b [K, L]; in float32 where they are float16."""
    return torch.ops.forde_fast.matmul(a, b, precision)


def terms(a: Tensor, b: Tensor, precision: str) -> list[tuple[Tensor, Tensor]]:
    """The products whose sum is a @ b, the small ones first."""
    if precision != "tf32x3":
        return [(a, b)]
    a_high, b_high = _high(a), _high(b)
    return [(a - a_high, b_high), (a_high, b - b_high), (a_high, b_high)]


def _high(x: Tensor) -> Tensor:
    """x without the bits that tf32 does not have: x less this is exact, and tf32 itself but for its last bits."""
    return (x.contiguous().view(torch.int32) & ~0x1FFF).view(torch.float32)


def in_half(x: Tensor) -> tuple[Tensor, float]:
    """(y, unit) with y in float16 and unit y = x but for rounding: its largest entry is between 2^13 and 2^14."""
    largest = float(x.abs().max())
    exponent = math.frexp(largest)[1] - 14 if largest > 0 else 0
    return (x.double() * 2.0**-exponent).to(torch.float16), 2.0**exponent


@torch.library.impl(library, "matmul", "CPU")
def _(a, b, precision):
    return a.float() @ b.float() if a.dtype == torch.float16 else a @ b


@torch.library.impl(library, "matmul", "CUDA")
def _(a, b, precision):
    if a.dtype == torch.float16:
        return torch.mm(a.flatten(0, -2), b, out_dtype=torch.float32).view(*a.shape[:-1], b.shape[1])
    if a.dtype != torch.float32:
        return a @ b
    with products_in("ieee" if precision == "ieee" else "tf32"):
        # sum() would start from 0 and so pass over one product more
        return functools.reduce(operator.add, (x @ y for x, y in terms(a, b, precision)))


@contextlib.contextmanager
def products_in(precision: str, convolutions: bool = False) -> Iterator[None]:
    """PyTorch's own products of float32, "tf32" or "ieee", and its `convolutions` too; afterwards all is as it was.

    PyTorch keeps this for each library, and in an older setting, which sets those of the products too and is the one
    that torch.compile asks for. Where they contradict each other, asking for the older one is an error.
    """
    general, conv = torch.backends.cudnn, torch.backends.cudnn.conv
    cuda, cpu = torch.backends.cuda.matmul, torch.backends.mkldnn.matmul
    before = _own(cuda, general), _own(cpu, torch.backends.mkldnn)
    convolved = _own(conv, general) if convolutions else None
    cuda.fp32_precision = cpu.fp32_precision = "ieee"  # which contradicts none of the older setting's values
    older = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
        if convolutions:
            conv.fp32_precision = precision
        yield
    finally:
        torch.set_float32_matmul_precision(older)
        cuda.fp32_precision, cpu.fp32_precision = before
        if convolutions:
            conv.fp32_precision = convolved


def _own(setting, general) -> str:
    """What is set there; "none" where the general one stands for it, which a setting shows as its own."""
    value = setting.fp32_precision
    return "none" if value != "none" and value == general.fp32_precision else value


@torch.library.register_fake("forde_fast::matmul")
def _(a, b, precision):
    dtype = torch.float32 if a.dtype == torch.float16 else a.dtype
    return a.new_empty((*a.shape[:-1], b.shape[-1]), dtype=dtype)
