"""Float32 matrix products on CUDA, in a precision that is asked for by name. Other tensors have but one."""

import contextlib
import functools
import operator
from collections.abc import Iterator

import torch
from torch import Tensor

from forde_fast.operators import library

# tf32 keeps 11 of 24 bits of every factor, which costs little here, for the rows are differences; tf32x3 splits the
# factors into two such parts and leaves out the product of the lower ones; ieee keeps all and is far slower
PRECISIONS = ("tf32", "tf32x3", "ieee")

library.define("matmul(Tensor a, Tensor b, str precision) -> Tensor")


def matmul(a: Tensor, b: Tensor, precision: str) -> Tensor:
    """a [..., K] @ b [K, L]."""
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


@torch.library.impl(library, "matmul", "CPU")
def _(a, b, precision):
    return a @ b


@torch.library.impl(library, "matmul", "CUDA")
def _(a, b, precision):
    if a.dtype != torch.float32:
        return a @ b
    with products_in("ieee" if precision == "ieee" else "tf32"):
        # sum() would start from 0 and so pass over one product more
        return functools.reduce(operator.add, (x @ y for x, y in terms(a, b, precision)))


@contextlib.contextmanager
def products_in(precision: str) -> Iterator[None]:
    """PyTorch's own products of float32 on CUDA, "tf32" or "ieee"."""
    setting = torch.backends.cuda.matmul
    before, general = setting.fp32_precision, torch.backends.fp32_precision
    setting.fp32_precision = precision
    try:
        yield
    finally:
        setting.fp32_precision = "none" if before == general else before  # "none": whatever the general one is


@torch.library.register_fake("forde_fast::matmul")
def _(a, b, precision):
    return a.new_empty((*a.shape[:-1], b.shape[-1]))
