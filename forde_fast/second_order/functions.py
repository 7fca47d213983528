"""autograd.Functions whose second-order pass is as lean as their first.

A backward is a Function again, so that autograd can differentiate it; the backward of that is plain computation.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor
from torch._functorch.utils import unwrap_dead_wrappers
from torch.autograd import Function

from forde_fast.second_order import reference


class Lean(Function):
    """A Function whose arguments have no defaults: torch binds them at every call, which takes as long as a small
    layer's computation."""

    @classmethod
    def apply(cls, *arguments):
        if torch._C._are_functorch_transforms_active():
            return super().apply(*arguments)
        return super(Function, cls).apply(*unwrap_dead_wrappers(arguments))


def batchable(function: type[Function]) -> type[Function]:
    """Its forward is its `compute`; under torch.func.vmap so too, with plain PyTorch in place of the kernels."""

    def vmap(info, in_dims, *arguments):
        compute = functools.partial(function.compute, reference)
        outputs = torch.vmap(compute, in_dims, randomness="different")(*arguments)
        return outputs, 0 if isinstance(outputs, Tensor) else (0,) * len(outputs)

    function.forward = staticmethod(functools.partial(function.compute, torch.ops.forde_fast))
    function.vmap = staticmethod(vmap)
    return function


def wanted(ctx, index: int) -> bool:
    """Whether the sweep now running needs the gradient of input `index`.

    ctx.needs_input_grad tells what any sweep may need: the one for input gradients would compute the weights' too.
    """
    if not ctx.needs_input_grad[index]:
        return False
    try:
        return torch._C._will_engine_execute_node(ctx.next_functions[index][0])
    except RuntimeError:  # a leaf that is itself asked for
        return True


def alone(sums: Tensor) -> Tensor:
    """The sums [rows, C] over all ranks, of which there is one."""
    return sums


@batchable
class Norm(Lean):
    """x, weight, bias, residual, mean and variance (None: those of x), ... -> z, statistics [4, C].

    reduce  [rows, C] -> [rows, C], adds per-channel sums over ranks, in all three passes
    """

    @staticmethod
    def compute(kernels, x, weight, bias, residual, mean, variance, eps, relu, reduce):
        if mean is None:
            statistics = _over_ranks(kernels.norm_statistics(x, eps), eps, reduce)
        else:
            mean, variance = mean.double(), variance.double()
            statistics = torch.stack([mean, (variance + eps).rsqrt(), torch.zeros_like(mean), variance])
        return kernels.norm_forward(x, residual, statistics, weight, bias, relu), statistics

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, weight, bias, residual, mean, _, _, ctx.relu, reduce = inputs
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
            return (None,) * 9
        x, weight, bias, z, statistics = ctx.saved_tensors
        layer = (x, weight, bias, z, statistics, ctx.relu, ctx.residual, ctx.reduce)
        dx, sums, *dresidual = NormBackward.apply(g, *layer)
        db = dw = None
        if wanted(ctx, 1) or wanted(ctx, 2):
            db, dw = sums.to((bias if weight is None else weight).dtype)
            db, dw = None if bias is None else db.to(bias.dtype), None if weight is None else dw
        return dx, dw, db, dresidual[-1] if ctx.residual else None, None, None, None, None, None


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


@batchable
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


@batchable
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


class Convolution(Lean):
    """aten.convolution of x and weight; `how` its stride, padding, dilation, transposed, output_padding and groups.

    It and its two gradients, each linear in both of its inputs, are one another's gradients: no pass has a batch as
    channels, which is how PyTorch's own double backward finds the weight's gradient.
    """

    @staticmethod
    def forward(x, weight, bias, how):
        return torch.ops.aten.convolution(_safe(x, how), weight, bias, *how)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, weight, _, ctx.how = inputs
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, weight)

    @staticmethod
    def backward(ctx, g):
        if g is None:
            return (None,) * 4
        x, weight = ctx.saved_tensors
        dx = ConvolutionInput.apply(g, weight, x, ctx.how) if wanted(ctx, 0) else None
        dw = ConvolutionWeight.apply(g, x, weight, ctx.how) if wanted(ctx, 1) else None
        db = g.sum([k for k in range(g.ndim) if k != 1]) if wanted(ctx, 2) else None
        return dx, dw, db, None

    @staticmethod
    def vmap(info, in_dims, *arguments):
        return torch.vmap(Convolution.forward, in_dims)(*arguments), 0


def _gradient(g, x, weight, how, which: int) -> Tensor:
    mask = [which == k for k in range(3)]
    if which == 1 and not x.is_cuda and x.shape[1] >= 256:  # where oneDNN is faster in the plain layout (44 to 26 ms)
        g, x = g.contiguous(), x.contiguous()
    return torch.ops.aten.convolution_backward(_safe(g, how), _safe(x, how), weight, None, *how, mask)[which]


def _safe(x: Tensor, how) -> Tensor:
    """x or, for a strided convolution of few channels on the CPU, x in the plain layout: channels-last, oneDNN's
    backward pass of a 1x1 convolution with stride 2 and 4 or 6 channels (torch 2.13) writes beyond its memory."""
    stride, groups = how[0], how[-1]
    narrow = not x.is_cuda and max(stride) > 1 and x.shape[1] // groups < 16
    return x.reshape(-1).view(x.shape) if narrow else x


class ConvolutionInput(Lean):
    """g, weight -> the gradient of x, of which only the shape and layout are read."""

    @staticmethod
    def forward(g, weight, x, how):
        return _gradient(g, x, weight, how, 0)

    @staticmethod
    def setup_context(ctx, inputs, output):
        g, weight, _, ctx.how = inputs
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(g, weight)

    @staticmethod
    def backward(ctx, u):
        if u is None:
            return (None,) * 4
        g, weight = ctx.saved_tensors
        dg = Convolution.apply(u, weight, None, ctx.how) if wanted(ctx, 0) else None
        dw = ConvolutionWeight.apply(g, u, weight, ctx.how) if wanted(ctx, 1) else None
        return dg, dw, None, None

    @staticmethod
    def vmap(info, in_dims, *arguments):
        return torch.vmap(ConvolutionInput.forward, in_dims)(*arguments), 0


class ConvolutionWeight(Lean):
    """g, x -> the gradient of the weight, of which only the shape is read."""

    @staticmethod
    def forward(g, x, weight, how):
        return _gradient(g, x, weight, how, 1)

    @staticmethod
    def setup_context(ctx, inputs, output):
        g, x, _, ctx.how = inputs
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(g, x)

    @staticmethod
    def backward(ctx, u):
        if u is None:
            return (None,) * 4
        g, x = ctx.saved_tensors
        dg = Convolution.apply(x, u, None, ctx.how) if wanted(ctx, 0) else None
        dx = ConvolutionInput.apply(g, u, x, ctx.how) if wanted(ctx, 1) else None
        return dg, dx, None, None

    @staticmethod
    def vmap(info, in_dims, *arguments):
        return torch.vmap(ConvolutionWeight.forward, in_dims)(*arguments), 0
