"""The registered operations of a batch normalisation and, on the CPU, of a convolution: schemas, and shapes for
tracing. C++ registers for CPU tensors, the Triton kernels for CUDA tensors; `reference` has the normalisation's in
plain PyTorch, with the formulas.

members  the batch is that of so many members, one after another (on the CPU). Each is normalised by itself: vectors
         have members x C numbers, statistics and sums so many columns. A convolution's weight has each one's outputs
"""

import torch

from forde_fast import operators

OPERATIONS = ("statistics", "forward", "backward_sums", "backward", "double_sums", "double_backward")

library = torch.library.Library("forde_fast", "FRAGMENT")
_LAYER = "Tensor statistics, Tensor? weight, Tensor? bias, bool relu"

library.define("norm_statistics(Tensor x, float eps, int members=1) -> Tensor")
library.define(f"norm_forward(Tensor x, Tensor? residual, {_LAYER}) -> Tensor")
library.define(f"norm_backward_sums(Tensor g, Tensor x, Tensor? z, {_LAYER}) -> Tensor")
library.define(
    f"norm_backward(Tensor g, Tensor x, Tensor? z, {_LAYER}, Tensor sums, bool residual) -> (Tensor, Tensor)"
)
library.define(f"norm_double_sums(Tensor u, Tensor g, Tensor x, Tensor? z, {_LAYER}) -> Tensor")
library.define(
    f"norm_double_backward(Tensor u, Tensor? u_residual, Tensor? v, Tensor g, Tensor x, Tensor? z, {_LAYER},"
    " Tensor sums, Tensor double_sums) -> (Tensor, Tensor)"
)
# For CUDA only, one launch each. A convolution's weight in another type, in channels last or (not `last`) not:
library.define("relayout(Tensor x, ScalarType dtype, bool last) -> Tensor")
# On [rows, C] alone:
library.define("norm_weight_cotangent(Tensor double_sums, Tensor sums, Tensor statistics, Tensor weight) -> Tensor")
library.define(
    "norm_track_(Tensor(a!) running_mean, Tensor(b!) running_variance, Tensor(c!)? tracked, Tensor statistics,"
    " float momentum) -> ()"
)
_HOW = "int[] stride, int[] padding, int[] dilation, int groups, int members"
library.define(f"convolve(Tensor x, Tensor weight, Tensor? bias, {_HOW}) -> Tensor")
library.define(f"convolve_input(Tensor g, Tensor weight, int[] size, {_HOW}) -> Tensor")
library.define(f"convolve_weight(Tensor g, Tensor x, int[] kernel, {_HOW}) -> Tensor")


def _sums(columns, rows):
    return columns.new_empty((rows, columns.shape[-1]), dtype=torch.float64)


@torch.library.register_fake("forde_fast::norm_statistics")
def _(x, eps, members=1):
    return x.new_empty((4, members * x.shape[1]), dtype=torch.float64)


torch.library.register_fake("forde_fast::norm_forward", lambda x, *rest: torch.empty_like(x))
torch.library.register_fake("forde_fast::norm_backward_sums", lambda g, x, z, statistics, *rest: _sums(statistics, 2))
torch.library.register_fake(
    "forde_fast::norm_double_sums", lambda u, g, x, z, statistics, *rest: _sums(statistics, 3)
)


@torch.library.register_fake("forde_fast::norm_backward")
def _(g, x, z, statistics, weight, bias, relu, sums, residual):
    return torch.empty_like(x), torch.empty_like(x) if residual else x.new_empty(0)


@torch.library.register_fake("forde_fast::norm_double_backward")
def _(u, u_residual, v, g, x, *rest):
    return torch.empty_like(x), torch.empty_like(x)


def _images(like, *shape):
    return like.new_empty(shape).to(memory_format=torch.channels_last)


@torch.library.register_fake("forde_fast::convolve")
def _(x, weight, bias, stride, padding, dilation, groups, members):
    sizes = zip(x.shape[2:], weight.shape[2:], stride, padding, dilation, strict=True)
    results = [(n + 2 * p - d * (k - 1) - 1) // s + 1 for n, k, s, p, d in sizes]
    return _images(x, len(x), len(weight) // members, *results)


@torch.library.register_fake("forde_fast::convolve_input")
def _(g, weight, size, stride, padding, dilation, groups, members):
    return _images(g, len(g), groups * weight.shape[1], *size)


@torch.library.register_fake("forde_fast::convolve_weight")
def _(g, x, kernel, stride, padding, dilation, groups, members):
    return x.new_empty((members * g.shape[1], x.shape[1] // groups, *kernel))


# device type -> types of x that its kernels take
TYPES: dict[str, tuple[torch.dtype, ...]] = {}
if not operators.UNUSABLE["cpp"]:
    TYPES["cpu"] = (torch.float32, torch.float64)
if torch.cuda.is_available() and not operators.UNUSABLE["triton"]:
    from forde_fast.kernels import layouts
    from forde_fast.kernels import second_order as kernels

    library.impl("relayout", layouts.relayout, "CUDA")
    for name in (*OPERATIONS, "weight_cotangent", "track_"):
        library.impl(f"norm_{name}", getattr(kernels, f"norm_{name}"), "CUDA")
    TYPES["cuda"] = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
