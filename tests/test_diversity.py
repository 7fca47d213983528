"""How much members differ, against sums over pairs written out."""

import itertools
import math

import pytest
import torch
from torch import nn
from torch.nn.functional import cosine_similarity

import forde_fast as ff
from forde_fast.evaluation import disagreement, gradient_cosine, input_gradients, kernel_similarity


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
