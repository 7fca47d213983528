"""How much members differ, against sums over pairs written out."""

import itertools
import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.functional import cosine_similarity

import forde_fast as ff
from forde_fast.evaluation import disagreement, gradient_cosine, input_gradients, kernel_similarity
from forde_fast.rule import Rule


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize(("members", "samples", "classes"), [(2, 1, 2), (3, 40, 4), (10, 33, 3)])
def test_disagreement(members, samples, classes):
    probs = normal(members, samples, classes).softmax(2)
    chosen = probs.argmax(2)
    pairs = [(a != b).double().mean().item() for a, b in itertools.combinations(chosen, 2)]
    assert disagreement(probs) == pytest.approx(sum(pairs) / len(pairs))
    assert disagreement(probs[:1]) == 0


@pytest.mark.parametrize(("members", "samples", "dimension"), [(2, 1, 3), (3, 20, 7), (10, 4, 5)])
def test_gradient_cosine_and_kernel(members, samples, dimension):
    j = normal(members, samples, dimension)
    pairs = [cosine_similarity(a, b).mean().item() for a, b in itertools.combinations(j, 2)]
    assert gradient_cosine(j) == pytest.approx(sum(pairs) / len(pairs))

    s = j / j.norm(dim=2, keepdim=True)
    pairs = [math.e ** (-(a - b).square().sum(1) / 0.7) for a, b in itertools.combinations(s, 2)]
    assert kernel_similarity(j, bandwidth=0.7) == pytest.approx(sum(p.mean().item() for p in pairs) / len(pairs))


@pytest.mark.parametrize("factor", [1e-310, 1e-160, 1e-20, 1e-14, 1e160, 1e300])
def test_the_cosine_is_the_same_at_every_scale(factor):
    j = normal(3, 20, 7)
    scales = torch.ones(3, 20, 1, dtype=torch.float64)
    scales[1], scales[2, ::2] = factor, factor  # rows of other scales beside each other
    assert gradient_cosine(j * factor) == pytest.approx(gradient_cosine(j))
    assert gradient_cosine(j * scales) == pytest.approx(gradient_cosine(j))


@pytest.mark.parametrize("members", [1, 3])
@pytest.mark.parametrize(
    ("bandwidth", "error", "message"),
    [
        ("mean", ValueError, "'median', a Median, a number or a tensor, got 'mean'"),
        (-1, ValueError, "a finite number > 0, got -1"),
        (0, ValueError, "a finite number > 0, got 0"),
        (math.nan, ValueError, "a finite number > 0, got nan"),
        (torch.zeros(()), ValueError, "finite values > 0, got"),
        (torch.ones(7), ValueError, r"a shape that broadcasts to \[., 5\], got \[7\]"),
        (Rule(), TypeError, "'median', a Median, a number or a tensor, got Rule"),
    ],
)
def test_bad_bandwidth(members, bandwidth, error, message):
    with pytest.raises(error, match=f"^bandwidth: expected {message}"):
        kernel_similarity(normal(members, 5, 4), bandwidth=bandwidth)


def test_degenerate_members():
    j = normal(1, 6, 4)
    assert gradient_cosine(j) == kernel_similarity(j) == 1
    twins = j.expand(3, -1, -1)
    assert gradient_cosine(twins) == pytest.approx(1)
    assert kernel_similarity(twins) == pytest.approx(1)
    assert gradient_cosine(torch.zeros(2, 3, 4)) == 0
    with pytest.raises(ValueError, match=r"^gradients: expected 3 dimensions \[M, B, D\], got shape \[2, 3\]"):
        gradient_cosine(torch.ones(2, 3))


@pytest.mark.parametrize("score", ["logit", "log_probability"])
def test_input_gradients_are_autograds_in_evaluation_mode(score):
    def make():
        return nn.Sequential(nn.Flatten(), nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 3))

    ensemble = ff.Ensemble(make, members=2, seed=0).double()
    ensemble(5 * normal(50, 1, 2, 3))  # running statistics that are not the batch's
    x, y = normal(7, 1, 2, 3), torch.arange(7) % 3
    with torch.no_grad():
        got = input_gradients(ensemble, x, y, score, batch_size=3)
    assert ensemble.training
    assert got.shape == (2, 7, 6)
    assert not got.requires_grad
    ensemble.eval()
    for member, own in zip(ensemble.members, got, strict=True):
        for b in range(7):
            one = x[b : b + 1].clone().requires_grad_()
            outputs = member(one)[0]
            outputs = outputs.log_softmax(0) if score == "log_probability" else outputs
            (expected,) = torch.autograd.grad(outputs[y[b]], one)
            torch.testing.assert_close(own[b], expected.flatten())


def small():
    """An ensemble with a batch for it."""
    return ff.Ensemble(lambda: nn.Linear(6, 3), members=2, seed=0), normal(5, 6).float(), torch.arange(5) % 3


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32, torch.uint16])
def test_input_gradients_take_labels_of_any_integer_dtype(dtype):
    ensemble, x, y = small()
    assert torch.equal(input_gradients(ensemble, x, y.to(dtype)), input_gradients(ensemble, x, y))


@pytest.mark.parametrize("score", ["logit", "log_probability", lambda outputs, y: (outputs * y[:, None]).sum(1)])
def test_input_gradients_in_and_after_inference_mode(score):
    ensemble, x, y = small()
    expected = input_gradients(ensemble, x, y, score)
    with torch.inference_mode():
        own_x, own_y = x.clone(), y.clone()
        assert torch.equal(input_gradients(ensemble, x, y, score), expected)
        assert torch.equal(input_gradients(ensemble, own_x, own_y, score), expected)
    assert torch.equal(input_gradients(ensemble, own_x, own_y, score), expected)
    torch.testing.assert_close(input_gradients(ensemble, x, own_y, score, batch_size=2), expected)


def test_a_callable_score_takes_other_labels():
    ensemble, x, _ = small()
    soft = normal(5, 3).float()
    got = input_gradients(ensemble, x, soft, lambda outputs, y: (outputs * y).sum(1))
    torch.testing.assert_close(got, torch.stack([soft @ member.weight for member in ensemble.members]).detach())


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda e, x, y: (e.members[0], x, y), TypeError, "ensemble: expected an Ensemble, got Linear"),
        (lambda e, x, y: (e, x.numpy(), y), TypeError, "x: expected a torch.Tensor, got ndarray"),
        (lambda e, x, y: (e, x.int(), y), TypeError, "x: expected dtype torch.float32, as the members, got"),
        (lambda e, x, y: (e, x.double(), y), TypeError, "x: expected dtype torch.float32, as the members, got"),
        (lambda e, x, y: (e, x.to("meta"), y), ValueError, "x: expected device cpu, as the members, got meta"),
        (lambda e, x, y: (e, x[:, 0], y), ValueError, r"x: expected at least 2 dimensions \[B, \.\.\.\], none"),
        (lambda e, x, y: (e, x[:0], y[:0]), ValueError, r"x: expected .*, none of size 0, got shape \[0, 6\]"),
        (lambda e, x, y: (e, x, np.zeros(5, int)), TypeError, "y: expected a torch.Tensor, got ndarray"),
        (lambda e, x, y: (e, x, y[:3]), ValueError, r"y: expected one label per sample, 5, got shape \[3\]"),
        (lambda e, x, y: (e, x, y.to("meta")), ValueError, "y: expected device cpu, as x, got meta"),
        (lambda e, x, y: (e, x, y + 1), ValueError, "y: expected values from 0 to 2, got values from 1 to 3"),
        (lambda e, x, y: (e, x, y - 1), ValueError, "y: expected values from 0 to 2, got values from -1 to 1"),
        (lambda e, x, y: (e, x, y.float()), TypeError, "y: expected an integer tensor, got torch.float32"),
        (lambda e, x, y: (e, x, y[:, None]), ValueError, r"y: expected 1 dimension \[B\], got shape \[5, 1\]"),
        (lambda e, x, y: (e, x, y, "logit", 0), ValueError, "batch_size: expected a whole number >= 1, got 0"),
    ],
)
def test_bad_input_of_input_gradients(change, error, message):
    ensemble, x, y = small()
    with pytest.raises(error, match=f"^{message}"):
        input_gradients(*change(ensemble, x, y))
    assert ensemble.training
