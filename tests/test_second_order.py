"""Accelerated layers against PyTorch's own, differentiated twice by autograd."""

import copy
import functools
import itertools
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn
from torch.autograd import gradcheck, gradgradcheck
from torch.nn import functional as F

import forde_fast as ff
from forde_fast import models
from forde_fast.second_order import norm_relu
from forde_fast.second_order.functions import INPUT, OUTPUT, WEIGHT, Convolution, How, Norm, alone

F32, F64 = torch.float32, torch.float64
needs_kernels = pytest.mark.skipif(not ff.available_backends()["cpp"].usable, reason="waits for the cpp backend")

SHAPES = [  # between them: vectors of channels and of neighbours, full and cut short; one number per plane; 3d
    (7, 5),
    (130, 19),
    (3, 6, 11),
    (4, 3, 5, 7),
    (2, 17, 8, 8),
    (5, 8, 1, 1),
    (2, 3, 2, 3, 4),
]


def draws(*shape, dtype=F64):
    return torch.randn(shape, dtype=dtype)


def layouts(x):
    """x, and where it is an image also with channels last."""
    last = {4: torch.channels_last, 5: torch.channels_last_3d}.get(x.ndim)
    return [x] if last is None else [x, x.contiguous(memory_format=last)]


def layer_of(shape, dtype=F64, **options):
    norm = [nn.BatchNorm1d, nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d][len(shape) - 2](shape[1], **options)
    norm = norm.to(dtype)
    with torch.no_grad():
        for p in norm.parameters():
            p.normal_()
        if norm.running_mean is not None:
            norm.running_mean.normal_()
            norm.running_var.uniform_(0.5, 2)
    return norm


def accelerated(model):
    fast = copy.deepcopy(model)
    ff.accelerate(fast)
    return fast


def twice(function, inputs, parameters, seed=0):
    """Outputs; first-order gradients of inputs and parameters; second-order ones; those of a training step."""
    generator = torch.Generator().manual_seed(seed)

    def cotangent(t):
        return torch.randn(t.shape, generator=generator, dtype=F64).to(t.dtype)

    def sweep(outputs, with_respect_to, **options):
        pairs = [(t, cotangent(t)) for t in outputs]
        outputs, cotangents = zip(*(pair for pair in pairs if pair[0].requires_grad), strict=True)
        return torch.autograd.grad(outputs, with_respect_to, cotangents, materialize_grads=True, **options)

    inputs = [t.detach().clone(memory_format=torch.preserve_format).requires_grad_() for t in inputs]
    out = function(*inputs)
    every = [*inputs, *parameters]
    first = sweep([out], every, create_graph=True)
    J = sweep([out], inputs[:1], create_graph=True)
    step = sweep([out, *J], every, retain_graph=True)
    second = sweep(first, every)
    return [t.detach() for t in (out, *first, *J, *step, *second)]


def assert_same(got, expected, rtol=1e-10):
    assert len(got) == len(expected)
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=rtol * float(other.detach().abs().max() + 1e-3))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("training", [True, False])
def test_normalisation_with_relu_and_residual(shape, training):
    norm = layer_of(shape).train(training)
    for x, relu, residual in itertools.product(layouts(draws(*shape)), (False, True), (False, True)):
        inputs = [x, draws(*shape)] if residual else [x]
        fast = accelerated(norm)

        plain = copy.deepcopy(norm)

        def ours(x, r=0, relu=relu, fast=fast):
            return norm_relu(fast, x, None if isinstance(r, int) else r) if relu else fast(x) + r

        def theirs(x, r=0, relu=relu, plain=plain):
            return F.relu(plain(x) + r) if relu else plain(x) + r

        expected = twice(theirs, inputs, list(plain.parameters()))
        assert_same(twice(ours, inputs, list(fast.parameters())), expected)
        for one, other in zip(fast.buffers(), plain.buffers(), strict=True):
            torch.testing.assert_close(one, other)


@needs_kernels
@pytest.mark.parametrize("layout", [0, 1])
@pytest.mark.parametrize("training", [True, False])
def test_normalisation_by_finite_differences(layout, training):
    x, residual, weight, bias = draws(3, 4, 2, 3), draws(3, 4, 2, 3), draws(4), draws(4)
    x = layouts(x)[layout]
    constants = (None, None) if training else (draws(4), draws(4).square())

    def function(x, weight, bias, residual):
        return Norm.apply(x, weight, bias, residual, *constants, 1e-5, True, alone, 1)[0]

    inputs = tuple(t.requires_grad_() for t in (x, weight, bias, residual))
    assert gradcheck(function, inputs)
    assert gradgradcheck(function, inputs)


@pytest.mark.parametrize("options", [{"affine": False}, {"track_running_stats": False}, {"momentum": None}])
@pytest.mark.parametrize("training", [True, False])
def test_options_of_a_normalisation(options, training):
    norm = layer_of((6, 5, 2, 2), **options).train(training)
    fast = accelerated(norm)
    for _ in range(2):
        x = draws(6, 5, 2, 2)
        assert_same(twice(fast, [x], list(fast.parameters())), twice(norm, [x], list(norm.parameters())))
    for one, other in zip(fast.buffers(), norm.buffers(), strict=True):
        torch.testing.assert_close(one, other)


@needs_kernels
@pytest.mark.parametrize("shape", [(4096, 16), (64, 16, 16, 16), (8, 19, 31, 9)])
@pytest.mark.parametrize("offset", [0.0, 100.0])
def test_float32_is_as_accurate_as_pytorch(shape, offset):
    x, norm = draws(*shape, dtype=F32) + offset, layer_of(shape, F32)
    fast, wide = accelerated(norm), copy.deepcopy(norm).double()
    exact = twice(wide, [x.double()], list(wide.parameters()))
    plain = twice(norm, [x], list(norm.parameters()))
    for same in layouts(x):
        got = twice(fast, [same], list(fast.parameters()))
        for one, rough, good in zip(got, plain, exact, strict=True):
            error, allowed = (one - good).norm(), (rough - good).norm()
            assert error <= 2 * allowed + 8 * torch.finfo(F32).eps * good.norm()


def test_ranks_that_add_their_sums():
    """Two ranks with a part of the batch each are one rank with all of it, in all three passes."""
    x, weight, bias = draws(6, 3, 2, 2), draws(3).requires_grad_(), draws(3).requires_grad_()
    sums, barrier = [None, None], threading.Barrier(2)

    def reduce(rank, own):
        sums[rank] = own
        barrier.wait(60)
        total = sums[0] + sums[1]
        barrier.wait(60)
        return total

    def run(rank):
        return _passes(x.split((2, 4))[rank], weight, bias, functools.partial(reduce, rank))

    with ThreadPoolExecutor(2) as pool:
        ranks = list(zip(*pool.map(run, range(2)), strict=True))
    whole = _passes(x, weight, bias, alone)
    for index in range(3):  # z, dx, and x's part of the last sweep
        torch.testing.assert_close(torch.cat(ranks[index]), whole[index])
    for index in (3, 4):  # the parameters' gradients are the ranks' sums
        torch.testing.assert_close(sum(ranks[index]), whole[index])


def _passes(x, weight, bias, reduce):
    x = x.detach().requires_grad_()
    z, _ = Norm.apply(x, weight, bias, *[None] * 3, 1e-5, True, reduce, 1)
    dx, dw, db = torch.autograd.grad(z.sin().sum(), (x, weight, bias), create_graph=True)
    scalars = z.cos().sum(), dx.square().sum(), (dw * weight.detach()).sum(), db.sum()
    return z, dx, *torch.autograd.grad(scalars, (x, weight, bias))


CONVOLUTIONS = [
    (nn.Conv2d(4, 6, 3, padding=1), (2, 4, 7, 5)),
    (nn.Conv2d(4, 6, (3, 2), stride=(2, 1), padding=(0, 1), dilation=(1, 2), bias=False), (2, 4, 8, 6)),
    (nn.Conv2d(4, 8, 1, stride=2, groups=2), (3, 4, 5, 5)),
    (nn.Conv2d(5, 5, 3, groups=5), (2, 5, 6, 6)),
    (nn.Conv1d(3, 4, 5, padding=2, stride=3), (2, 3, 11)),
    (nn.Conv3d(2, 3, 2, padding=1), (2, 2, 3, 4, 3)),
]


@pytest.mark.parametrize(("conv", "shape"), CONVOLUTIONS, ids=str)
def test_convolutions(conv, shape):
    conv = copy.deepcopy(conv).double()
    for x in layouts(draws(*shape)):
        fast = accelerated(conv)
        assert type(fast) is not type(conv)
        expected = twice(conv, [x], list(conv.parameters()))
        assert_same(twice(fast, [x], list(fast.parameters())), expected)


def test_convolution_by_finite_differences():
    inputs = [t.requires_grad_() for t in (draws(2, 4, 4, 3), draws(2, 2, 3, 2), draws(2))]
    how = How((2, 1), (1, 0), (1, 1), 2, False)
    assert gradgradcheck(lambda *tensors: Convolution.apply(OUTPUT, None, *tensors, how), inputs)


@pytest.mark.parametrize("channels", [1, 3])
def test_channels_last_where_asked_for(channels):
    conv = nn.Conv2d(channels, 4, 3)
    x = torch.randn(2, channels, 6, 6)
    plain = conv(x)
    ff.accelerate(conv)
    assert conv(x).is_contiguous()
    ff.accelerate(conv, channels_last=True)
    assert conv(x).is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(conv(x), plain)


def test_the_sweep_for_input_gradients_computes_no_weight_gradient(monkeypatch):
    model = accelerated(models.cnn(3, 1, 4))
    x = torch.randn(4, 1, 8, 8, requires_grad=True)
    asked = []
    original = Convolution.forward
    monkeypatch.setattr(Convolution, "forward", lambda which, *rest: asked.append(which) or original(which, *rest))
    out = model(x)
    (J,) = torch.autograd.grad(out.sum(), x, create_graph=True)
    assert asked == [OUTPUT] * 3 + [INPUT] * 3
    asked.clear()
    torch.autograd.grad((out.square().sum(), J.square().sum()), list(model.parameters()))
    # each layer's once more forward, and the first layer's input is asked for no more
    assert sorted(asked) == [OUTPUT] * 3 + [INPUT] * 2 + [WEIGHT] * 6


@pytest.mark.parametrize("frozen", ["norm0.weight", "conv1.weight", "norm1", "head"])
def test_frozen_parameters(frozen):
    model = models.cnn(3, 1, 4).double()
    for name, p in model.named_parameters():
        p.requires_grad_(not name.startswith(frozen))
    fast = accelerated(model)
    x = draws(5, 1, 6, 6)
    live = [[p for p in m.parameters() if p.requires_grad] for m in (fast, model)]
    assert_same(twice(fast, [x], live[0]), twice(model, [x], live[1]))


def test_one_number_per_channel_is_an_error_as_in_pytorch():
    for norm, shape in ((nn.BatchNorm1d(3), (1, 3)), (nn.BatchNorm2d(3), (1, 3, 1, 1))):
        with pytest.raises(ValueError, match="more than 1 value per channel") as plain:
            norm(torch.randn(shape))
        fast = accelerated(norm)
        for call in (fast, functools.partial(norm_relu, fast)):
            with pytest.raises(ValueError, match="more than 1 value") as ours:
                call(torch.randn(shape))
            assert str(ours.value) == str(plain.value)


@pytest.mark.parametrize("shape", [(4, 3, 2, 2), (5, 3)])
def test_nan_and_infinity_pass(shape):
    norm = layer_of(shape)
    for odd in (float("nan"), float("inf")):
        x = draws(*shape)
        x[0, 1] = odd
        torch.testing.assert_close(norm_relu(accelerated(norm), x), norm_relu(norm, x), equal_nan=True)


def test_a_third_derivative_is_refused():
    norm, x = accelerated(layer_of((4, 3))), draws(4, 3).requires_grad_()
    (first,) = torch.autograd.grad(norm(x).sin().sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(first.sin().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="twice"):
        torch.autograd.grad(second.sum(), x)


@needs_kernels
def test_small_calls_are_left_to_pytorch_but_for_ranks(monkeypatch):
    norm = accelerated(nn.BatchNorm1d(4))
    monkeypatch.setattr(type(norm), "smallest", 4 * 8)
    assert not norm.takes(torch.randn(7, 4))
    assert norm.takes(torch.randn(8, 4))
    norm.reduce = lambda sums: sums
    assert norm.takes(torch.randn(7, 4))


def test_a_convolution_of_no_pixels_is_refused():
    if not ff.available_backends()["cpp"]:
        pytest.skip("needs the C++ extension")
    rest = [1, 1], [1, 1], [1, 1], 1, 1
    with pytest.raises(RuntimeError, match="a kernel that fits into the image"):
        torch.ops.forde_fast.convolve(torch.randn(2, 3, 0, 3), torch.randn(4, 3, 1, 1), None, *rest)
    with pytest.raises(RuntimeError, match="a kernel that fits into the image"):
        torch.ops.forde_fast.convolve_input(torch.randn(2, 4, 2, 5), torch.randn(4, 3, 1, 1), [0, 3], *rest)
