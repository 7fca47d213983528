"""Drop-in layers: PyTorch's own, whose class alone changes. They compute what the layer they replace computes, by it
where the Functions do not apply."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.modules import module as torch_module

from forde_fast.second_order import operators, reference
from forde_fast.second_order.functions import OUTPUT, Convolution, How, Norm, Relayout, alone
from forde_fast.validation import expect


def norm_relu(norm: nn.Module, x: Tensor, residual: Tensor | None = None) -> Tensor:
    """relu(norm(x) + residual), in one pass where `norm` is an accelerated batch normalisation."""
    if isinstance(norm, BatchNorm) and not _watched(norm) and norm.takes(x, residual):
        return norm.normalise(x, residual, relu=True)
    y = norm(x)
    return torch.relu(y if residual is None else y + residual)


class BatchNorm:
    """Mixed into PyTorch's batch normalisations: kernels for both orders, with ReLU and residual in the same pass.

    reduce  [rows, C] -> [rows, C] in float64: adds per-channel sums over ranks in all three passes
    """

    reduce: Callable[[Tensor], Tensor] = staticmethod(alone)
    # Numbers in x on a CPU; what is smaller is left to PyTorch. Both orders together, [128, 128]: 0.91 ms against
    # PyTorch's 0.59, all of it in calls; [128, 64, 2, 2]: 1.6 against 2.2.
    smallest = 2**15

    def takes(self, x: Tensor, residual: Tensor | None = None) -> bool:
        """Whether the kernels can do this call; what they cannot, wrong shapes among it, is left to PyTorch."""
        own = [t for t in (self.weight, self.bias, self.running_mean, self.running_var) if t is not None]
        return (
            _plain_eager(x)
            and x.dtype in operators.TYPES.get(x.device.type, ())
            and x.ndim >= 2
            and x.shape[1] == self.num_features
            and x.numel() > x.shape[1]
            and (x.is_cuda or _numbers(x) >= self.smallest or self.reduce is not alone)
            and all(t.device == x.device and t.dtype in (x.dtype, torch.float32) for t in own)
            and (residual is None or (residual.shape == x.shape and residual.dtype == x.dtype))
        )

    def forward(self, x: Tensor) -> Tensor:
        if self.takes(x):
            return self.normalise(x)
        apart = self.reduce is alone or not self.training
        expect(apart, "BatchNorm", "a batch that can be normalised over all ranks", f"{x.dtype} {list(x.shape)}")
        return super().forward(x)

    def normalise(self, x: Tensor, residual: Tensor | None = None, relu: bool = False) -> Tensor:
        self._check_input_dim(x)
        tracked = self.running_mean is not None
        constants = (None, None) if self.training or not tracked else (self.running_mean, self.running_var)
        z, statistics = Norm.apply(x, self.weight, self.bias, residual, *constants, self.eps, relu, self.reduce, 1)
        if self.training and tracked:
            self._track(statistics)
        return z

    @torch.no_grad()
    def _track(self, statistics: Tensor) -> None:
        tracked, momentum = self.num_batches_tracked, self.momentum
        own = statistics.is_cuda and momentum is not None and _no_transforms()
        if momentum is None:
            momentum = 0.0
            if tracked is not None:  # a tensor: the host need not wait for it
                momentum = (tracked + 1).to(self.running_mean.dtype).reciprocal()
        track = torch.ops.forde_fast.norm_track_ if own else reference.norm_track_
        track(self.running_mean, self.running_var, tracked, statistics, momentum)


class FastBatchNorm1d(BatchNorm, nn.BatchNorm1d):
    pass


class FastBatchNorm2d(BatchNorm, nn.BatchNorm2d):
    pass


class FastBatchNorm3d(BatchNorm, nn.BatchNorm3d):
    pass


class Conv:
    """Mixed into PyTorch's convolutions: three Functions that are one another's gradients.

    channels_last  bring the input to that layout first; False: the layout of the input stays, as PyTorch has it
    """

    channels_last = False

    def forward(self, x: Tensor) -> Tensor:
        dimensions = len(self.kernel_size)
        if not _plain_eager(x) or x.ndim != dimensions + 2 or isinstance(self.padding, str):
            return super().forward(x)
        if self.channels_last and x.ndim == 4:
            x = _channels_last(x)
        kind, weight = x.device.type, self.weight
        tensors = x, self.bias
        if torch.is_autocast_enabled(kind) and x.dtype != torch.float64:
            to = torch.get_autocast_dtype(kind)
            tensors = [None if t is None else t.to(to) for t in tensors]
        else:
            to = weight.dtype
        if self.channels_last and x.ndim == 4 and weight.is_cuda and "cuda" in operators.TYPES and _no_transforms():
            weight = Relayout.apply(weight, to, True)  # once here: cuDNN would do it in every pass
        how = How(self.stride, self.padding, self.dilation, self.groups, self.channels_last)
        return Convolution.apply(OUTPUT, None, tensors[0], weight.to(to), tensors[1], how)


def _channels_last(x: Tensor) -> Tensor:
    """By moves of dimensions, which torch.func.vmap knows, unlike memory formats."""
    if x.shape[1] == 1:  # both layouts are the same numbers: `contiguous` would leave the other one's strides
        return x.contiguous().squeeze(1).unsqueeze(-1).movedim(-1, 1)
    return x.movedim(1, -1).contiguous().movedim(-1, 1)


class FastConv1d(Conv, nn.Conv1d):
    pass


class FastConv2d(Conv, nn.Conv2d):
    pass


class FastConv3d(Conv, nn.Conv3d):
    pass


class FastSequential(nn.Sequential):
    """Takes a batch normalisation and the ReLU after it in one pass, unless a hook watches either."""

    def forward(self, x):
        layers, at = list(self), 0
        while at < len(layers):
            following = layers[at + 1] if at + 1 < len(layers) else None
            fused = isinstance(layers[at], BatchNorm) and type(following) is nn.ReLU and not _watched(following)
            x = norm_relu(layers[at], x) if fused else layers[at](x)
            at += 2 if fused else 1
        return x


def _watched(module: nn.Module) -> bool:
    """Whether a call of the module does more than its forward."""
    own = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return any(own) or torch_module._has_any_global_hook()


def _no_transforms() -> bool:
    """Whether no torch.func transform is at work, whose tensors only PyTorch's own operations take."""
    return not torch._C._are_functorch_transforms_active()


def _numbers(x: Tensor) -> int:
    """In x and, under torch.func.vmap, its siblings."""
    while torch._C._functorch.is_functorch_wrapped_tensor(x):
        x = torch._C._functorch.get_unwrapped(x)
    return x.numel()


def _plain_eager(x) -> bool:
    return (
        type(x) is Tensor
        and x.layout == torch.strided
        and not torch.compiler.is_compiling()
        and not torch.jit.is_tracing()
        and forward_ad._current_level < 0
    )
