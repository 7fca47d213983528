"""Convolution weights between PyTorch's layout and channels last, and between two types, in one pass."""

import torch
import triton
import triton.language as tl


@triton.jit
def _relayout_kernel(
    x,  # [O, I, K], or [O, K, I] where it is channels last
    out,  # the other way round
    I, K,
    LAST: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """LAST: whether `out` is channels last. The compiler has the threads exchange what they loaded: both sides go
    through memory in order."""
    o, i = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK_I + tl.arange(0, BLOCK_I)
    k = tl.arange(0, BLOCK_K)
    inside = (i < I)[:, None] & (k < K)[None, :]
    planes = o * I * K + i[:, None] * K + k[None, :]
    last = o * I * K + k[None, :] * I + i[:, None]
    if LAST:
        tl.store(out + last, tl.load(x + planes, mask=inside), mask=inside)
    else:
        tl.store(out + planes, tl.load(x + last, mask=inside), mask=inside)


def _launch(kernel, grid, tensors, numbers, constants):
    with torch.cuda.device_of(tensors[0]):
        kernel[grid](*tensors, *numbers, **constants)


def relayout(x, dtype, last):
    """x [O, I, ...] of 4 dimensions -> the same numbers in `dtype`, in channels last or in the plain layout."""
    layouts = torch.contiguous_format, torch.channels_last
    x = x.contiguous(memory_format=layouts[not last])
    out = torch.empty_like(x, dtype=dtype, memory_format=layouts[last])
    (O, I), K = x.shape[:2], x.shape[2] * x.shape[3]
    constants = {"BLOCK_I": min(128, triton.next_power_of_2(I)), "BLOCK_K": triton.next_power_of_2(K)}
    grid = O, triton.cdiv(I, constants["BLOCK_I"])
    _launch(_relayout_kernel, grid, (x, out), (I, K), constants | {"LAST": last, "num_warps": 4})
    return out
