"""Input gradients: against explicit Jacobians, terms across samples included."""

import pytest
import torch
from torch import nn
from torch.autograd.functional import jacobian

import forde_fast as ff

F64 = torch.float64
B, K = 5, 4

NETS = {
    "linear": lambda: nn.Linear(6, K),
    "perceptron": lambda: nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, K)),
    "BatchNorm": lambda: nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, K)),
}
SCORES = {
    "logit": lambda o, y: torch.stack([o[b, y[b]] for b in range(B)]),
    "log_probability": lambda o, y: torch.stack([o[b, y[b]] - torch.log(torch.exp(o[b]).sum()) for b in range(B)]),
}


def setup(make):
    return make().to(F64), torch.randn(B, 6, dtype=F64), torch.randint(K, (B,))


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("make", NETS.values(), ids=NETS)
def test_particles_are_the_jacobian_of_the_summed_score(make, score):
    net, x, y = setup(make)
    full = jacobian(lambda x: SCORES[score](net(x), y), x)  # [B, B, 6]
    outputs, particles = ff.InputGradients(score)(net, x, y)
    assert torch.allclose(particles, full.sum(0), rtol=1e-12, atol=1e-14)
    assert torch.allclose(outputs, net(x))
    across = full.clone()
    across[range(B), range(B)] = 0
    has_batchnorm = any(isinstance(m, nn.BatchNorm1d) for m in net.modules())
    assert (across.abs().max() > 1e-6) == has_batchnorm  # the sum is no sum over one term there


def test_evaluation_mode_has_no_terms_across_samples():
    net, x, y = setup(NETS["BatchNorm"])
    net.eval()
    _, together = ff.InputGradients()(net, x, y)
    alone = torch.cat([ff.InputGradients()(net, x[b : b + 1], y[b : b + 1])[1] for b in range(B)])
    assert torch.allclose(together, alone)


def test_the_logit_is_the_default():
    net, x, y = setup(NETS["linear"])
    _, particles = ff.InputGradients()(net, x, y)
    assert torch.equal(particles, net.weight[y])


def test_particles_carry_the_graph_to_the_parameters():
    net, x, y = setup(NETS["BatchNorm"])
    cotangent = torch.randn(B, 6, dtype=F64)
    _, particles = ff.InputGradients()(net, x, y)
    pulled = torch.autograd.grad(particles, net[0].weight, cotangent)[0]

    def inner(weight):
        def scores(x):
            return SCORES["logit"](torch.func.functional_call(net, {"0.weight": weight}, (x,)), y)

        return (jacobian(scores, x, create_graph=True).sum(0) * cotangent).sum()

    weight = net[0].weight.detach().requires_grad_()
    assert torch.allclose(pulled, torch.autograd.grad(inner(weight), weight)[0], rtol=1e-10, atol=1e-13)


def test_any_score_of_outputs_and_labels():
    """Regression: y is no class."""
    net, x, _ = setup(NETS["perceptron"])
    y = torch.randn(B, K, dtype=F64)

    def squared(outputs, y):
        return (outputs - y).square().sum(1)

    _, particles = ff.InputGradients(squared)(net, x, y)
    assert torch.allclose(particles, jacobian(lambda x: squared(net(x), y), x).sum(0))


def test_images_are_flattened_and_left_alone():
    net = nn.Sequential(nn.Flatten(), nn.Linear(12, K))
    x, y = torch.randn(B, 3, 2, 2), torch.randint(K, (B,))
    _, particles = ff.InputGradients()(net, x, y)
    assert particles.shape == (B, 12)
    assert not x.requires_grad
    attached = x.clone().requires_grad_()  # a graph behind x is not walked into
    ff.InputGradients()(net, attached, y)[1].sum().backward()
    assert attached.grad is None


@pytest.mark.parametrize(
    ("score", "shape"),
    [(lambda o, y: o, "[5, 4]"), (lambda o, y: o.sum(), "[]"), (lambda o, y: o[:, :1], "[5, 1]")],
    ids=["all outputs", "a scalar", "a column"],
)
def test_a_score_of_another_shape(score, shape):
    net, x, y = setup(NETS["perceptron"])
    with pytest.raises(ValueError, match=r"^score: expected one number per sample, \[5\], got ") as raised:
        ff.InputGradients(score)(net, x, y)
    assert str(raised.value).endswith(f"got {shape}")


@pytest.mark.parametrize("score", ["logits", "", None, 3, ["logit"]])
def test_unknown_score_lists_the_scores(score):
    with pytest.raises(ValueError, match=r"^score: expected one of logit, log_probability, got "):
        ff.InputGradients(score)
