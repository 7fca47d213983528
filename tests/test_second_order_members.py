"""The C++ passes of convolutions and normalisations, of one member and of several in one call, and what torch.vmap
makes of them, against PyTorch's own layers one after another."""

import copy

import pytest
import torch
from test_second_order import accelerated, assert_same, layer_of, layouts, twice
from torch import nn

import forde_fast as ff
from forde_fast import models
from forde_fast.second_order import functions, reference
from forde_fast.second_order.functions import INPUT, OUTPUT, WEIGHT, How
from forde_fast.spaces import InputGradients
from forde_fast.step import Objective, gradient, init
from forde_fast.strategies import LOOP, Strategy

pytest.importorskip("forde_fast._C")
F32, F64 = torch.float32, torch.float64

CASES = [  # members, batch, channels, outputs, image, kernel, stride, padding, dilation, groups
    (1, 3, 1, 16, (8, 8), (3, 3), 1, 1, 1, 1),
    (3, 5, 16, 9, (8, 7), (3, 3), 2, 1, 1, 1),  # an output beyond a vector; a column that no window reaches
    (2, 2, 3, 33, (7, 9), (3, 2), (2, 1), (1, 0), (1, 2), 2),
    (3, 4, 4, 7, (5, 5), (1, 1), 2, 0, 1, 3),  # positions that have no gradient
    (2, 1, 2, 3, (6, 5), (4, 4), 3, 2, 1, 1),
    (2, 70, 8, 20, (4, 4), (3, 3), 2, 1, 1, 1),  # several blocks of images, the last one cut short
    (1, 2, 3, 3, (5, 5), (1, 1), 1, 2, 1, 1),  # results of padding alone
    (2, 0, 3, 8, (5, 5), (3, 3), 1, 1, 1, 1),
]


def convolutions(case, dtype):
    """Tensors output, x, weight, bias of all members, and the options."""
    members, batch, channels, outputs, image, kernel, *options, groups = case
    stride, padding, dilation = ((o, o) if isinstance(o, int) else o for o in options)
    x = torch.randn(members * batch, groups * channels, *image, dtype=F64).to(dtype)
    weight, bias = (
        torch.randn(members * groups * outputs, *rest, dtype=F64).to(dtype) for rest in ((channels, *kernel), ())
    )
    how = How(stride, padding, dilation, groups, True, members)
    return x, weight, bias, how


def one_by_one(which, output, x, weight, bias, how):
    def parts(t):
        return [None] * how.members if t is None else t.view(how.members, -1, *t.shape[1:]).unbind()

    alone = how._replace(members=1)
    every = zip(*map(parts, (output, x, weight, bias)), strict=True)
    return torch.cat([functions._aten(which, *tensors, alone) for tensors in every])


@pytest.mark.parametrize("case", CASES, ids=str)
def test_convolutions(case, capability):
    for dtype in (F32, F64):
        x, weight, bias, how = convolutions(case, dtype)
        wide = [t.double() for t in (x, weight, bias)]
        output = torch.randn_like(one_by_one(OUTPUT, None, *wide, how)).to(dtype)
        for which in (OUTPUT, INPUT, WEIGHT) if len(x) else (OUTPUT, INPUT):
            exact = one_by_one(which, output.double(), *wide, how)
            plain = one_by_one(which, output, x, weight, bias, how)
            for g, images in zip(layouts(output), layouts(x), strict=True):
                found = functions._own(which, g, images, weight, bias, how)
                assert found.shape == exact.shape
                assert which == WEIGHT or found.is_contiguous(memory_format=torch.channels_last)
                allowed = 2 * (plain - exact).norm() + 8 * torch.finfo(dtype).eps * exact.norm()
                assert (found - exact).norm() <= allowed


def test_no_images_have_a_gradient_of_zero():
    x, weight, bias, how = convolutions(CASES[-1], F32)
    output = functions._own(OUTPUT, None, x, weight, bias, how)
    assert not functions._own(WEIGHT, output, x, weight, None, how).any()


def test_the_same_numbers_whatever_the_threads():
    x, weight, bias, how = convolutions((1, 40, 8, 16, (9, 9), (3, 3), 1, 1, 1, 1), F32)
    output, before, found = functions._own(OUTPUT, None, x, weight, bias, how), torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append([functions._own(which, output, x, weight, bias, how) for which in (OUTPUT, INPUT, WEIGHT)])
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(one, same) for other in found[1:] for one, same in zip(other, found[0], strict=True))


BAD = [
    ("convolve", {"weight": torch.randn(8, 4, 3, 3)}, "x: expected 4 channels, got 3"),
    ("convolve", {"weight": torch.randn(8, 3, 3, 3, dtype=F64)}, "one type"),
    ("convolve", {"weight": torch.randn(8, 3, 7, 7)}, "kernel that fits"),
    ("convolve", {"stride": (4, 4), "weight": torch.randn(8, 3, 7, 7)}, "kernel that fits"),
    ("convolve", {"bias": torch.randn(7)}, "bias: expected 8"),
    ("convolve", {"members": 3}, "members, groups: expected divisors"),
    ("convolve_input", {"size": (7, 6)}, "g: expected"),
    ("convolve_weight", {"kernel": (3, 2)}, "g: expected"),
]


@pytest.mark.parametrize(("name", "odd", "message"), BAD, ids=[m for *_, m in BAD])
def test_bad_calls_are_named(name, odd, message):
    x, weight, g = torch.randn(2, 3, 6, 6), torch.randn(8, 3, 3, 3), torch.randn(2, 8, 4, 4)
    own = {
        "convolve": {"x": x, "weight": weight, "bias": None},
        "convolve_input": {"g": g, "weight": weight, "size": (6, 6)},
        "convolve_weight": {"g": g, "x": x, "kernel": (3, 3)},
    }[name]
    given = own | {"stride": (1, 1), "padding": (0, 0), "dilation": (1, 1), "groups": 1, "members": 1} | odd
    with pytest.raises(RuntimeError, match=message):
        getattr(torch.ops.forde_fast, name)(**given)


def passes(kernels, x, residual, g, u, u_residual, v, weight, bias, *members):
    """Every pass of a normalisation, each on what the one before it gave."""
    statistics = kernels.norm_statistics(x, 1e-5, *members)
    layer = (statistics, weight, bias, True)
    z = kernels.norm_forward(x, residual, *layer)
    sums = kernels.norm_backward_sums(g, x, z, *layer)
    first = kernels.norm_backward(g, x, z, *layer, sums, True)
    double_sums = torch.cat([kernels.norm_double_sums(u, g, x, z, *layer), v[1] * sums])
    second = kernels.norm_double_backward(u, u_residual, v, g, x, z, *layer, sums, double_sums)
    return [statistics, sums, double_sums], [z, *first, *second]


@pytest.mark.parametrize("shape", [(7, 5), (33, 19), (3, 5, 2, 3), (20, 9, 31, 9)])
def test_normalisations_of_several_members(shape, capability):
    members, channels = 3, shape[1]
    images = [torch.randn(members, *shape, dtype=F64) for _ in range(5)]
    v = torch.randn(members, 2, channels, dtype=F64)
    affine = torch.randn(2, members, channels, dtype=F64)
    each = [passes(reference, *(t[m] for t in images), v[m], *affine[:, m]) for m in range(members)]
    rows, wanted = ([torch.stack(own) for own in zip(*kind, strict=True)] for kind in zip(*each, strict=True))
    for batch in zip(*(layouts(t.flatten(0, 1)) for t in images), strict=True):
        vectors = v.movedim(0, 1).reshape(2, -1), *affine.flatten(1)
        found = passes(torch.ops.forde_fast, *batch, *vectors, members)
        assert_same([t.view(-1, members, channels).movedim(1, 0) for t in found[0]], rows)
        assert_same([t.view(members, *shape) for t in found[1]], wanted)


def plain_layout():
    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(288, 4))


def depthwise():
    """Of which one convolution is left to PyTorch."""
    model = nn.Sequential(
        nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 3, 2, 1, groups=8, bias=False), nn.BatchNorm2d(8, affine=False),
        nn.Conv2d(8, 16, 1, groups=2), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 4),
    )  # fmt: skip
    model.channels_last = True
    return model


NETS = {
    "cnn": lambda: models.cnn(4, 3, 8),
    "plain layout": plain_layout,
    "depthwise": depthwise,
    "resnet18": lambda: models.resnet18(8, 4),
    "mlp": lambda: models.mlp(4, (3, 6, 6)),
}


@pytest.mark.parametrize("make", NETS.values(), ids=NETS)
@pytest.mark.parametrize("training", [True, False])
def test_stacked_members_with_fast_layers(make, training):
    """Gradients, losses and running statistics of PyTorch's layers, one member after another."""
    ensemble = ff.Ensemble(make, 3).double()
    for member in ensemble.members:
        for module in member.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.train(training)
                module.running_mean.normal_()
                module.running_var.uniform_(0.5, 2)
    x, y = torch.randn(5, 3, 6, 6, dtype=F64), torch.randint(4, (5,))
    found, objective = [], Objective(ff.Method(InputGradients()))
    for strategy in (LOOP, Strategy("stacked"), Strategy("stacked", members_at_a_time=2)):
        buffers = init(ensemble).buffers
        g, log = gradient(ensemble, ensemble.flat, buffers, x, y, objective, True, strategy)
        found.append([g, torch.stack(log), *(b for own in buffers for b in own.values())])
        ff.accelerate(ensemble)  # all but the first are with fast layers
    for other in found[1:]:
        assert_same([t.double() for t in other], [t.double() for t in found[0]], 1e-8)


def test_a_layer_twice_under_vmap():
    """One normalisation and one convolution for all members: their tensors are not stacked."""
    norm, conv = layer_of((4, 3, 5, 5)), nn.Conv2d(3, 8, 3).double()
    x = torch.randn(2, 4, 3, 5, 5, dtype=F64)
    fast = accelerated(nn.Sequential(norm, conv))
    ff.accelerate(fast, channels_last=True)
    norm, fast = norm.eval(), fast.eval()

    def separately(x):
        return torch.stack([conv(norm(one)) for one in x])

    parameters = [list(fast.parameters()), [*norm.parameters(), *conv.parameters()]]
    assert_same(twice(torch.vmap(fast), [x], parameters[0]), twice(separately, [copy.deepcopy(x)], parameters[1]))
