"""autograd.Functions whose second-order pass is as lean as their first.

A backward is a Function again, so that autograd can differentiate it; the backward of that is plain computation.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch._functorch.utils import unwrap_dead_wrappers
from torch.autograd import Function

from forde_fast.second_order import operators, reference


class Lean(Function):
    """A Function whose arguments have no defaults: torch binds them at every call, which takes as long as a small
    layer's computation."""

    @classmethod
    def apply(cls, *arguments):
        if torch._C._are_functorch_transforms_active():
            return super().apply(*arguments)
        return super(Function, cls).apply(*unwrap_dead_wrappers(arguments))


def fold(t: Tensor, dim: int | None, at: int, members: int) -> Tensor:
    """Members' tensors, stacked along `dim` (None: one for all), as one, the members folded into dimension `at`."""
    t = t.unsqueeze(at).expand(*t.shape[:at], members, *t.shape[at:]) if dim is None else t.movedim(dim, at)
    return t.flatten(at, at + 1)


def stackable(images: tuple[int, ...], count: int | None = None) -> Callable:
    """Decorates a Function whose forward is its `compute`. Under torch.func.vmap, on the CPU, the members' batches
    are one batch and their channels one row of channels; on another device `compute` is plain PyTorch's there.

    images  which arguments are [N, C, ...], the last of them x; the other tensors' last dimension are the channels
    count   which argument is the number of members
    """

    def decorate(function: type[Function]) -> type[Function]:
        def vmap(info, in_dims, *arguments):
            members = info.batch_size
            if arguments[images[-1]].device.type != "cpu":
                compute = functools.partial(function.compute, reference)
                outputs = torch.vmap(compute, in_dims, randomness="different")(*arguments)
                return outputs, (0,) * len(outputs)
            folded = list(arguments)
            for k, (t, dim) in enumerate(zip(arguments, in_dims, strict=True)):
                if isinstance(t, Tensor):
                    folded[k] = fold(t, dim, 0 if k in images else t.ndim - 1 - (dim is not None), members)
            if count is not None:
                folded[count] *= members
            outputs = function.apply(*folded)
            dims = tuple(0 if t.shape == folded[images[-1]].shape else t.ndim - 1 for t in outputs)
            return tuple(t.unflatten(dim, (members, -1)) for t, dim in zip(outputs, dims, strict=True)), dims

        function.forward = staticmethod(functools.partial(function.compute, torch.ops.forde_fast))
        function.vmap = staticmethod(vmap)
        return function

    return decorate


def wanted(ctx, index: int) -> bool:
    """Whether the sweep now running needs the gradient of input `index`.

    ctx.needs_input_grad tells what any sweep may need: the one for input gradients would compute the weights' too.
    ctx.tensors: which inputs are tensors; the others have no edge of the graph.
    """
    if not ctx.needs_input_grad[index]:
        return False
    try:
        return torch._C._will_engine_execute_node(ctx.next_functions[sum(ctx.tensors[:index])][0])
    except RuntimeError:  # a leaf that is itself asked for
        return True


def alone(sums: Tensor) -> Tensor:
    """The sums [rows, C] over all ranks, of which there is one."""
    return sums


@stackable(images=(3, 0), count=-1)
class Norm(Lean):
    """x, weight, bias, residual, mean and variance (None: those of x), ... -> z, statistics [4, C].

    reduce   [rows, C] -> [rows, C], adds per-channel sums over ranks, in all three passes
    members  as in operators.py
    """

    @staticmethod
    def compute(kernels, x, weight, bias, residual, mean, variance, eps, relu, reduce, members):
        if mean is None:
            statistics = _over_ranks(kernels.norm_statistics(x, eps, members), eps, reduce)
        else:
            mean, variance = mean.double(), variance.double()
            statistics = torch.stack([mean, (variance + eps).rsqrt(), torch.zeros_like(mean), variance])
        return kernels.norm_forward(x, residual, statistics, weight, bias, relu), statistics

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.tensors = [isinstance(given, Tensor) for given in inputs]
        x, weight, bias, residual, mean, _, _, ctx.relu, reduce, _ = inputs
        z, statistics = output
        ctx.reduce = reduce if mean is None else alone
        ctx.residual = residual is not None
        ctx.mark_non_differentiable(statistics)
        ctx.set_materialize_grads(False)
        # without a residual the ReLU's mask is found again from x
        ctx.save_for_backward(x, weight, bias, z if ctx.relu and ctx.residual else None, statistics)

    @staticmethod
    def backward(ctx, g, _):
        if g is None:
            return (None,) * 10
        x, weight, bias, z, statistics = ctx.saved_tensors
        layer = (x, weight, bias, z, statistics, ctx.relu, ctx.residual, ctx.reduce)
        dx, sums, *dresidual = NormBackward.apply(g, *layer)
        db = dw = None
        if wanted(ctx, 1) or wanted(ctx, 2):
            db, dw = sums.to((bias if weight is None else weight).dtype)
            db, dw = None if bias is None else db.to(bias.dtype), None if weight is None else dw
        return dx, dw, db, dresidual[-1] if ctx.residual else None, *[None] * 6


def _over_ranks(statistics: Tensor, eps: float, reduce) -> Tensor:
    """Each rank's own statistics -> those of all numbers together."""
    if reduce is alone:
        return statistics
    mean, _, share, variance = statistics
    count, total = reduce(torch.stack([1 / share, mean / share]))
    mean_of_all = total / count
    (squares,) = reduce(((variance + (mean - mean_of_all).square()) / share)[None])
    variance = squares / count
    return torch.stack([mean_of_all, (variance + eps).rsqrt(), 1 / count, variance])


@stackable(images=(0, 4, 1))
class NormBackward(Lean):
    """g, ... -> dx, (db, dw) as own [2, C], with ranks the same over all, and dresidual where there is a residual."""

    @staticmethod
    def compute(kernels, g, x, weight, bias, z, statistics, relu, residual, reduce):
        layer = (x, z, statistics, weight, bias, relu)
        own = kernels.norm_backward_sums(g, *layer)
        everywhere = () if reduce is alone else (reduce(own),)
        dx, masked = kernels.norm_backward(g, *layer, everywhere[0] if everywhere else own, residual)
        return (dx, own, *everywhere, masked) if residual else (dx, own, *everywhere)

    @staticmethod
    def setup_context(ctx, inputs, output):
        g, x, weight, bias, z, statistics, ctx.relu, _, ctx.reduce = inputs
        own = sums = output[1]
        if ctx.reduce is not alone:
            sums = output[2]
            ctx.mark_non_differentiable(sums)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(g, x, weight, bias, z, statistics, own, sums)

    @staticmethod
    def backward(ctx, u, v, *rest):
        rest = rest if ctx.reduce is alone else rest[1:]
        u_residual = rest[0] if rest else None
        if u is None and v is None and u_residual is None:
            return (None,) * 9
        dg, dx, *dw = NormDoubleBackward.apply(u, v, u_residual, *ctx.saved_tensors, ctx.relu, ctx.reduce)
        return dg, dx, dw[0] if dw else None, None, None, None, None, None, None


@stackable(images=(0, 2, 3, 7, 4))
class NormDoubleBackward(Lean):
    """u, v [2, C], u_residual: cotangents of NormBackward's results -> those of its g, x and weight.

    A Function for its rule under vmap.
    """

    @staticmethod
    def compute(kernels, u, v, u_residual, g, x, weight, bias, z, statistics, own, sums, relu, reduce):
        layer = (g, x, z, statistics, weight, bias, relu)
        u = torch.zeros_like(x) if u is None else u
        own_double = double_sums = kernels.norm_double_sums(u, *layer)
        if v is not None:
            double_sums = torch.cat([double_sums, v[1] * own])
        double_sums = reduce(double_sums)
        dg, dx = kernels.norm_double_backward(u, u_residual, v, *layer, sums, double_sums)
        if weight is None:
            return dg, dx
        kernels = kernels if x.is_cuda else reference
        return dg, dx, kernels.norm_weight_cotangent(own_double, sums, statistics, weight)

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, *cotangents):
        raise RuntimeError("a batch normalisation here is differentiable twice, a third derivative was asked for")


class Relayout(Lean):
    """A convolution's weight in another type, in channels last or (not `last`) in the plain layout. PyTorch's own
    copy to the latter reaches a seventh of a GPU's bandwidth."""

    @staticmethod
    def forward(weight, dtype, last):
        return torch.ops.forde_fast.relayout(weight, dtype, last)

    @staticmethod
    def setup_context(ctx, inputs, output):
        weight, _, ctx.last = inputs
        ctx.dtype = weight.dtype

    @staticmethod
    def backward(ctx, g):
        return Relayout.apply(g, ctx.dtype, not ctx.last), None, None


class How(NamedTuple):
    """Options of a convolution. channels_last: results may be in that layout whatever comes in."""

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int
    channels_last: bool
    members: int = 1  # as in operators.py


OUTPUT, INPUT, WEIGHT = range(3)


class Convolution(Lean):
    """One of the output, the input and the weight of a convolution, or a cotangent of it, from the other two.

    which  OUTPUT: the convolution of input and weight; INPUT, WEIGHT: its gradients, for an output's cotangent. The
           tensor `which` itself says only what shape the result has (None for the output). Each is linear in both of
           its sources, and the gradients of all three are of the same kind: no pass has a batch as channels, which is
           how PyTorch's own double backward finds the weight's gradient
    """

    @staticmethod
    def forward(which, output, x, weight, bias, how):
        return (_own if _suits(x, weight, how) else _aten)(which, output, x, weight, bias, how)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.tensors = [isinstance(given, Tensor) for given in inputs]
        ctx.which, *tensors, _, ctx.how = inputs
        tensors[ctx.which] = None
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx, g):
        gradients = [None] * 6
        if g is not None:
            tensors = list(ctx.saved_tensors)
            tensors[ctx.which] = g
            for which in (OUTPUT, INPUT, WEIGHT):
                if which != ctx.which and wanted(ctx, 1 + which):
                    gradients[1 + which] = Convolution.apply(which, *tensors, None, ctx.how)
            if ctx.which == OUTPUT and wanted(ctx, 4):
                each = g.unflatten(0, (ctx.how.members, -1))
                gradients[4] = each.sum([k for k in range(each.ndim) if k not in (0, 2)]).flatten()
        return tuple(gradients)

    @staticmethod
    def vmap(info, in_dims, which, *arguments):
        *tensors, how = arguments
        members = info.batch_size
        folded = [
            None if t is None else fold(t, dim, 0, members) for t, dim in zip(tensors, in_dims[1:], strict=False)
        ]
        how = how._replace(members=members * how.members)
        if _suits(*folded[1:3], how):
            return Convolution.apply(which, *folded, how).unflatten(0, (members, -1)), 0
        return torch.vmap(functools.partial(_aten, which), in_dims[1:])(*arguments), 0


# Numbers in a group's weight up to which the own kernels are used. 2 threads, AVX2, ms of output, input and weight,
# own against oneDNN: 64 to 64 channels, [32, 64, 32, 32]: 18, 18, 26 against 16, 19, 34; 128 to 128,
# [128, 128, 4, 4]: 5.4, 5.5, 10.0 against 4.5, 4.8, 8.5; 1 to 16, [128, 1, 28, 28]: 0.8, 3.8, 1.2 against 7.7, 3.9,
# 3.7.
MOST = 1 << 17


def _suits(x: Tensor, weight: Tensor, how: How) -> bool:
    return (
        how.channels_last
        and not x.is_cuda
        and x.dtype == weight.dtype
        and x.dtype in operators.TYPES.get(x.device.type, ())
        and x.ndim == 4
        and x.shape[1] == weight.shape[1] * how.groups
        and weight.numel() <= MOST * how.groups * how.members
        and weight.shape[0] >= 8 * how.groups * how.members  # depthwise ones would waste most of a vector
    )


def _own(which: int, output, x, weight, bias, how: How) -> Tensor:
    rest = how.stride, how.padding, how.dilation, how.groups, how.members
    if which == OUTPUT:
        return torch.ops.forde_fast.convolve(x, weight, bias, *rest)
    if which == INPUT:
        return torch.ops.forde_fast.convolve_input(output, weight, x.shape[2:], *rest)
    return torch.ops.forde_fast.convolve_weight(output, x, weight.shape[2:], *rest)


def _aten(which: int, output, x, weight, bias, how: How) -> Tensor:
    of_all = how.stride, how.padding, how.dilation, False, (0,) * len(how.stride), how.groups
    if which == OUTPUT:
        return torch.ops.aten.convolution(_safe(x, how), weight, bias, *of_all)
    if which == WEIGHT and not x.is_cuda and x.shape[1] >= 256:  # oneDNN is faster in the plain layout: 44 to 26 ms
        output, x = output.contiguous(), x.contiguous()
    mask = [which == INPUT, which == WEIGHT, False]
    g = _safe(output, how)
    return torch.ops.aten.convolution_backward(g, _safe(x, how), weight, None, *of_all, mask)[which - 1]


def _safe(x: Tensor, how: How) -> Tensor:
    """x or, for a strided convolution of few channels on the CPU, x in the plain layout: channels-last, oneDNN's
    backward pass of a 1x1 convolution with stride 2 and 4 or 6 channels (torch 2.13) writes beyond its memory."""
    narrow = not x.is_cuda and max(how.stride) > 1 and x.shape[1] // how.groups < 16
    return x.reshape(-1).view(x.shape) if narrow else x
