"""What the trainer is given: bad batches and arguments are named before anything changes."""

import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from trainer_cases import net, same_state, state_of

import forde_fast as ff
from forde_fast.testing import make_pca

pytestmark = pytest.mark.usefixtures("one_thread")


# ---------------------------------------------------------------- what comes in


@pytest.mark.parametrize("shape", [(6, 3, 2, 3), (6, 13)], ids=str)
def test_a_shape_the_network_cannot_take_changes_nothing(shape):
    """The BatchNorm before the layer that fails would have been updated."""
    ensemble = ff.Ensemble(lambda: nn.Sequential(nn.BatchNorm2d(3), net()), 2)
    trainer = ff.Trainer(ensemble)
    trainer.step(X, Y)
    kept = state_of(ensemble)
    with pytest.raises((RuntimeError, ValueError)):
        trainer.step(torch.randn(shape), Y)
    assert same_state(ensemble, kept)


X, Y = torch.randn(6, 3, 2, 2), torch.tensor([0, 1, 2, 3, 0, 1])


def with_value(value):
    x = X.clone()
    x[1, 2, 0, 1] = value
    return x


BAD_BATCHES = [
    (X.double(), Y, TypeError, r"^x: expected dtype torch.float32, as the members, got torch.float64"),
    (X.long(), Y, TypeError, r"^x: expected float32, float64 or bfloat16, got torch.int64"),
    (X.to(torch.uint8), Y, TypeError, r"^x: expected float32, float64 or bfloat16, got torch.uint8"),
    (X.tolist(), Y, TypeError, r"^x: expected a torch.Tensor, got list"),
    (X.numpy(), Y, TypeError, r"^x: expected a torch.Tensor, got ndarray"),
    (X[0, 0, 0], Y, ValueError, r"^x: expected 2 dimensions \[B, ...\], got shape \[2\]"),
    (X[:0], Y[:0], ValueError, r"^x: expected at least one of each of B"),
    (with_value(float("nan")), Y, ValueError, r"^x: expected finite numbers, got nan at \[1, 2, 0, 1\]"),
    (with_value(-float("inf")), Y, ValueError, r"^x: expected finite numbers, got -inf at \[1, 2, 0, 1\]"),
    (torch.randn(6, 3, 2, 3), Y, ValueError, r"^x: expected 12 values per sample, as the lengthscale"),
    (X, Y.tolist(), TypeError, r"^y: expected a torch.Tensor, got list"),
    (X, Y[:5], ValueError, r"^y: expected 6 of them, one per sample, got \[5\]"),
    (X, torch.tensor(1), ValueError, r"^y: expected 6 of them, one per sample, got \[\]"),
    (X, Y[:, None], ValueError, r"^y: expected 1 dimension \[B\], got shape \[6, 1\]"),
    (X, Y + 1, ValueError, r"^y: expected values from 0 to 3, got values from 1 to 4"),
    (X, Y - 1, ValueError, r"^y: expected values from 0 to 3, got values from -1 to 2"),
    (X, Y.float(), TypeError, r"^y: expected an integer tensor, got torch.float32"),
    (X, Y > 0, TypeError, r"^y: expected an integer tensor, got torch.bool"),
    (X, Y.int(), TypeError, r"^y: expected dtype torch.int64, got torch.int32"),
    (X, Y.to(torch.uint8), TypeError, r"^y: expected dtype torch.int64, got torch.uint8"),
    (X, torch.rand(6, 4), TypeError, r"^y: expected an integer tensor, got torch.float32"),
]


@pytest.mark.parametrize("after", [0, 1], ids=["first step", "second step"])
@pytest.mark.parametrize(("x", "y", "error", "message"), BAD_BATCHES, ids=[m[1:40] for *_, m in BAD_BATCHES])
def test_bad_batches_are_named_before_anything_changes(x, y, error, message, after):
    ensemble = ff.Ensemble(net, 2)
    trainer = ff.Trainer(ensemble, lengthscale=make_pca(12))
    for _ in range(after):
        trainer.step(X, Y)
    kept, velocity, random = state_of(ensemble), trainer.velocity.clone(), torch.get_rng_state()
    with pytest.raises(error, match=message) as raised:
        trainer.step(x, y)
    assert "\n" not in str(raised.value)
    assert same_state(ensemble, kept)
    assert torch.equal(trainer.velocity, velocity)
    assert torch.equal(torch.get_rng_state(), random)
    assert trainer.steps == after


@pytest.mark.parametrize("y", [Y + 1, Y - 1, Y.int(), Y.float()], ids=["above", "below", "int32", "float"])
def test_labels_are_looked_at_for_other_losses_too(y):
    ensemble = ff.Ensemble(net, 2)
    kept = state_of(ensemble)
    with pytest.raises((TypeError, ValueError), match=r"^y: expected"):
        ff.Trainer(ensemble, loss=lambda o, y: F.cross_entropy(o, y, label_smoothing=0.1)).step(X, y)
    assert same_state(ensemble, kept)


BAD_ARGUMENTS = [
    ({"method": "fordes"}, ValueError, r"^method: expected one of de, forde, weight-rde, .*, got 'fordes'"),
    ({"method": None}, ValueError, r"^method: expected one of de, forde, weight-rde, .*, got None"),
    ({"method": ["de"]}, ValueError, r"^method: expected one of de, forde, weight-rde, .*, got \['de'\]"),
    ({"backend": "cude"}, ValueError, r"^backend: expected one of auto, reference, cpp, triton"),
    ({"lr": 0}, ValueError, r"^lr: expected a finite number > 0, got 0"),
    ({"lr": -0.1}, ValueError, r"^lr: expected a finite number > 0, got -0.1"),
    ({"lr": float("nan")}, ValueError, r"^lr: expected a finite number > 0, got nan"),
    ({"lr": "0.1"}, ValueError, r"^lr: expected a finite number > 0, got '0.1'"),
    ({"eps": 0.0}, ValueError, r"^eps: expected a finite number > 0, got 0.0"),
    ({"eps": -1e-24}, ValueError, r"^eps: expected a finite number > 0, got -1e-24"),
    ({"repulsion_weight": -1}, ValueError, r"^repulsion_weight: expected a finite number >= 0, got -1"),
    ({"repulsion_weight": float("inf")}, ValueError, r"^repulsion_weight: expected a finite number >= 0"),
    ({"weight_decay": -1e-4}, ValueError, r"^weight_decay: expected a finite number >= 0, got -0.0001"),
    ({"cuda_graph": "no"}, TypeError, r"^cuda_graph: expected None, True or False, got 'no'"),
    ({"channels_last": 1}, TypeError, r"^channels_last: expected None, True or False, got 1"),
    ({"momentum": 1.5}, ValueError, r"^momentum: expected a number below 1, got 1.5"),
    ({"momentum": -0.9}, ValueError, r"^momentum: expected a finite number >= 0, got -0.9"),
    ({"lengthscale": "pca"}, TypeError, r"^lengthscale: expected None or a lengthscale .*, got str"),
    ({"lengthscale": torch.eye(12)}, TypeError, r"^lengthscale: expected None or .*, got Tensor"),
    ({"optimizer": 5}, TypeError, r"^optimizer: expected a callable that takes parameters, got int"),
    ({"optimizer": lambda p: None}, TypeError, r"^optimizer: expected a callable that makes a .*, got NoneType"),
    ({"optimizer": torch.optim.LBFGS}, TypeError, r"^optimizer: .* needs no closure, got LBFGS"),
    ({"mesh": 3}, TypeError, r"^mesh: expected a distributed.Mesh, got int"),
    ({"loss": "cross_entropy"}, TypeError, r"^loss: expected a callable"),
    ({"accelerate": "no"}, TypeError, r"^accelerate: expected True or False, got 'no'"),
    ({"nesterov": None}, TypeError, r"^nesterov: expected True or False, got None"),
    ({"seed": -1}, ValueError, r"^seed: expected a whole number >= 0, got -1"),
]


@pytest.mark.parametrize(("given", "error", "message"), BAD_ARGUMENTS, ids=[m for *_, m in BAD_ARGUMENTS])
def test_bad_arguments_are_named(given, error, message):
    with pytest.raises(error, match=message):
        ff.Trainer(ff.Ensemble(net, 2), **given)


def test_the_ensemble_must_be_one():
    with pytest.raises(TypeError, match=r"^ensemble: expected an Ensemble, got Sequential"):
        ff.Trainer(net())


def test_numpy_numbers_are_numbers():
    ff.Trainer(ff.Ensemble(net, 2), lr=np.float32(0.1), eps=np.float64(1e-24), repulsion_weight=np.int64(2))


@pytest.mark.parametrize("epochs", [0, -1, 1.5, True, "3"])
def test_epochs_must_be_a_whole_number(epochs):
    with pytest.raises(ValueError, match=r"^epochs: expected a whole number >= 1, got "):
        ff.Trainer(ff.Ensemble(net, 2)).fit([(X, Y)], epochs)


@pytest.mark.parametrize(
    ("batch", "got"),
    [
        ({"x": X, "y": Y}, "dict"),
        ((X, Y, Y), r"\['Tensor', 'Tensor', 'Tensor'\]"),
        ((X.numpy(), Y), r"\['ndarray', 'Tensor'\]"),
        ((X, Y.tolist()), r"\['Tensor', 'list'\]"),
        (X, "Tensor"),
    ],
)
def test_batches_of_another_kind_are_named(batch, got):
    message = rf"^loader: expected a batch \(x, y\) of two tensors in epoch 0, batch 1, got {got}$"
    with pytest.raises(TypeError, match=message):
        ff.Trainer(ff.Ensemble(net, 2)).fit([(X, Y), batch], 1)


class Odd(nn.Module):
    """A network that does `what` to its input, or with its output."""

    def __init__(self, what):
        super().__init__()
        self.linear, self.what = nn.Linear(12, 4), what

    def forward(self, x):
        return self.what(self.linear, x.flatten(1))


ODD = {
    "in place": (lambda linear, x: linear(x.mul_(0.5)), ValueError, "networks that leave their input as it is"),
    "dict": (lambda linear, x: {"logits": linear(x)}, TypeError, r"networks whose output is a tensor .*, got dict"),
}


@pytest.mark.parametrize(("what", "error", "message"), ODD.values(), ids=ODD)
@pytest.mark.parametrize("method", ["de", "forde"])
def test_networks_that_cannot_be_members_are_named(what, error, message, method):
    ensemble, x = ff.Ensemble(lambda: Odd(what), 2), X.clone()
    with pytest.raises(error, match=f"^modules: expected {message}"):
        ff.Trainer(ensemble, method).step(x, Y)
    with pytest.raises(error, match=f"^modules: expected {message}"):
        ensemble.predict(x)


LOSSES = {
    "one for each sample": lambda outputs, y: F.cross_entropy(outputs, y, reduction="none"),
    "no tensor": lambda outputs, y: F.cross_entropy(outputs, y).item(),
}


@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
@pytest.mark.parametrize("strategy", ["loop", "stacked"])
def test_losses_of_another_kind_are_named(loss, strategy):
    with pytest.raises(TypeError, match=r"^loss: expected a callable \(outputs, y\) -> a tensor \[\]") as raised:
        ff.Trainer(ff.Ensemble(net, 2), "de", loss=loss).step(X, Y)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("method", ["de", "forde", "weight-rde", "function-rde"])
def test_batches_made_in_inference_mode(method):
    """As features of a frozen backbone are."""
    with torch.inference_mode():
        x, y = X.clone(), Y.clone()
    own, other = (ff.Trainer(ff.Ensemble(net, 2), method) for _ in range(2))
    own.step(x, y), other.step(X, Y)
    assert torch.equal(own.ensemble.flat, other.ensemble.flat)


def test_a_batch_that_a_layer_refuses_says_where():
    def normalised():
        return nn.Sequential(nn.Flatten(), nn.Linear(12, 8), nn.BatchNorm1d(8), nn.Linear(8, 4))

    trainer = ff.Trainer(ff.Ensemble(normalised, 2))
    trainer.step(X, Y)
    with pytest.raises(ValueError, match=r"^step 1: Expected more than 1 value per channel when training"):
        trainer.step(X[:1], Y[:1])


def test_a_rate_that_is_none():
    trainer = ff.Trainer(ff.Ensemble(net, 2))
    with pytest.raises(ValueError, match=r"^rate: expected a finite number >= 0, got nan"):
        trainer.fit([(X, Y)], 1, schedule=lambda progress: math.nan)


def test_empty_loader():
    trainer = ff.Trainer(ff.Ensemble(net, 2))
    with pytest.raises(TypeError, match=r"^loader: expected an iterable of batches, got int$"):
        trainer.fit(3, 1)
    with pytest.raises(TypeError, match=r"^schedule: expected a callable"):
        trainer.fit([(X, Y)], 1, schedule=0.1)
    with pytest.raises(ValueError, match=r"^loader: expected at least one batch .*, got none in epoch 0"):
        trainer.fit([], 3)
    with pytest.raises(ValueError, match=r"^loader: .* none in epoch 1"):
        trainer.fit(iter([(X, Y)]), 2)  # can be read only once
