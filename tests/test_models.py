import re

import numpy as np
import pytest
import torch
from torch import nn

from forde_fast import models

SMALL = {"mlp": 6, "cnn": 2, "resnet18": 2, "preactresnet18": 2}


@pytest.fixture(autouse=True)
def one_thread(threads_come_back):
    """These networks are too small to share: on a busy machine their threads would only wait."""
    torch.set_num_threads(1)


def small(name, in_shape=(2, 6, 6)):
    torch.manual_seed(0)
    return models.make(name, 3, in_shape, SMALL[name])


def test_resnet18_has_the_published_number_of_parameters():
    with torch.device("meta"):
        model = models.resnet18()
        preact = models.preactresnet18()
    assert sum(p.numel() for p in model.parameters()) == 11_173_962
    # TinyImageNet's 200 classes; no BatchNorm at the stem or on shortcuts, one before the head
    assert sum(p.numel() for p in preact.parameters()) == 11_269_640


@pytest.mark.parametrize("name", models.MODELS)
@pytest.mark.parametrize("in_shape", [(1, 8, 8), (3, 9, 7)])  # the digits; odd sides through the strides
def test_logits(name, in_shape):
    model = models.make(name, 10, in_shape, SMALL[name])
    x = torch.randn(4, *in_shape)
    assert model(x).shape == (4, 10)
    assert model.eval()(x[:1]).shape == (1, 10)
    assert isinstance(model.head, nn.Linear)
    assert model.head.out_features == 10


def test_default_widths():
    assert [p.shape[0] for n, p in models.mlp().named_parameters() if n.startswith("linear")] == [128, 128]
    assert models.make("mlp", 10, (1, 28, 28)).head.in_features == 128
    assert models.make("cnn", 10, (1, 28, 28)).head.in_features == 64
    with torch.device("meta"):
        assert models.make("resnet18", 10, (3, 32, 32)).head.in_features == 512
    assert models.make("resnet18", 7, [1, 8, 8], 3).head.weight.shape == (7, 24)


@pytest.mark.parametrize("name", models.MODELS)
def test_initialisation_is_haikus(name):
    torch.manual_seed(0)
    model = models.make(name, 10, (3, 8, 8), 32)
    for layer in model.modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            weight, sigma = layer.weight.detach(), layer.weight[0].numel() ** -0.5
            assert weight.abs().max() <= 2 * sigma * (1 + 1e-6)
            # deviation of a normal cut off at two sigma; five standard errors of a sample's deviation
            error = 5 * 0.6 / weight.numel() ** 0.5
            assert weight.std() / sigma == pytest.approx(0.8796, abs=error)
            assert weight.mean().abs() < 5 * sigma / weight.numel() ** 0.5
            assert layer.bias is None or not layer.bias.any()
        elif isinstance(layer, nn.BatchNorm1d | nn.BatchNorm2d):
            assert (layer.weight == 1).all()
            assert not layer.bias.any()
            assert (layer.momentum, layer.eps) == (0.1, 1e-5)


def test_initialisation_follows_the_seed():
    first, again = (torch.cat([p.flatten() for p in small("cnn").parameters()]) for _ in range(2))
    assert torch.equal(first, again)


def test_zero_head_starts_without_logits():
    model = models.resnet18(2, 4, 1, zero_head=True)
    assert not model(torch.randn(3, 1, 8, 8)).any()
    assert models.resnet18(2, 4, 1).head.weight.any()


@pytest.mark.parametrize("name", models.MODELS)
def test_twice_differentiable(name):
    """What FoRDE needs, against central differences: the derivative of the input gradient by the weights."""
    model = small(name).double()
    x = torch.randn(4, 2, 6, 6, dtype=torch.double, requires_grad=True)
    cotangent = torch.randn_like(x)
    parameters = list(model.parameters())

    def along():
        (gradient,) = torch.autograd.grad(model(x).square().sum(), x, create_graph=True)
        return (gradient * cotangent).sum()

    second = torch.autograd.grad(along(), parameters, allow_unused=True)
    direction = [torch.randn_like(p) for p in parameters]
    expected = sum((s * d).sum() for s, d in zip(second, direction, strict=True) if s is not None).item()

    values = []
    for step in (1e-7, -2e-7):
        with torch.no_grad():
            for p, d in zip(parameters, direction, strict=True):
                p += step * d
        values.append(along().item())
    assert (values[0] - values[1]) / 2e-7 == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("name", models.MODELS)
def test_gradgradcheck(name):
    model = small(name, (1, 3, 3)).double()
    x = torch.randn(3, 1, 3, 3, dtype=torch.double, requires_grad=True)
    assert torch.autograd.gradgradcheck(lambda x: model(x).square().sum(), x, fast_mode=True)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: models.resnet18(width=0), "width: expected a whole number >= 1, got 0"),
        (lambda: models.resnet18(in_channels=-1), "in_channels: expected a whole number >= 1, got -1"),
        (lambda: models.cnn(width=2.5), "width: expected a whole number >= 1, got 2.5"),
        (lambda: models.cnn(in_channels=0), "in_channels: expected a whole number >= 1, got 0"),
        (lambda: models.mlp(num_classes=True), "num_classes: expected a whole number >= 1, got True"),
        (lambda: models.mlp(num_classes=0), "num_classes: expected a whole number >= 1, got 0"),
        (lambda: models.mlp(hidden=(8, 0)), "hidden: expected a whole number >= 1, got 0"),
        (lambda: models.mlp(in_shape=(28, 28)), "in_shape: expected (C, H, W)"),
        (lambda: models.make("vgg", 10, (1, 8, 8)), "name: expected one of mlp, cnn, resnet18, preactresnet18, got"),
        (lambda: models.make("cnn", 10, (1, 0, 8)), "in_shape: expected a whole number >= 1, got 0"),
        (lambda: models.make("mlp", 10, (1, 8, 8), 0), "width: expected a whole number >= 1, got 0"),
    ],
)
def test_bad_sizes(build, message):
    with pytest.raises(ValueError, match=rf"^{re.escape(message)}[^\n]*$"):
        build()


@pytest.mark.parametrize("name", models.MODELS)
def test_sizes_may_be_numpys(name):
    classes, width, *shape = np.array([3, SMALL[name], 2, 6, 6])
    torch.manual_seed(0)
    found, wanted = models.make(name, classes, tuple(shape), width), small(name)
    assert all(map(torch.equal, found.state_dict().values(), wanted.state_dict().values()))
