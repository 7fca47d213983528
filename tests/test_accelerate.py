"""`accelerate` on models that this project did not write: nothing that they compute or keep changes."""

import copy
import functools
import io

import pytest
import torch
from test_second_order import accelerated, assert_same, twice
from torch import nn
from torch.func import functional_call, grad, jvp, stack_module_state, vmap
from torch.nn import functional as F

import forde_fast as ff
from forde_fast import models
from forde_fast.second_order import layers

F64 = torch.float64


class Transformer(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Conv2d(3, 8, 2, stride=2)
        self.norm1, self.norm2 = nn.LayerNorm(8), nn.LayerNorm(8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.feed = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8))
        self.head = nn.Linear(8, 4)

    def forward(self, x):
        x = self.embed(x)
        x = x.view(len(x), 8, -1).mT  # fails where the layout has changed
        z = self.norm1(x)
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            x = x + self.attention(z, z, z, need_weights=False)[0]
        return self.head((x + self.feed(self.norm2(x))).mean(1))


class Shared(nn.Module):
    """One layer twice, its result used three times, its ReLU in place."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3)
        self.block = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.MaxPool2d(2))

    def forward(self, x):
        y = self.norm(self.conv(x))
        z = self.norm(self.conv(F.relu(y))) + y.sigmoid()
        return self.block(z + x).flatten(1)


def separable():
    return nn.Sequential(
        nn.Conv2d(3, 6, 1), nn.Conv2d(6, 6, 3, padding=1, groups=6, bias=False), nn.BatchNorm2d(6), nn.SiLU(),
        nn.Conv2d(6, 8, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4),
    )  # fmt: skip


def groups():
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, 2, 1),
        nn.GroupNorm(2, 6),
        nn.ReLU(),
        nn.Conv2d(6, 4, 2),
        nn.InstanceNorm2d(4),
        nn.Flatten(),
    )


def dropout():
    return nn.Sequential(
        nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Dropout2d(0.3), nn.Flatten(), nn.Dropout(0.5),
        nn.Linear(96, 12), nn.BatchNorm1d(12, momentum=None), nn.ReLU(), nn.Linear(12, 4),
    )  # fmt: skip


NETS = {
    "transformer": Transformer,
    "shared layers": Shared,
    "separable": separable,
    "GroupNorm": groups,
    "dropout": dropout,
    "own cnn": lambda: models.cnn(4, 3, 4),
    "own resnet": lambda: models.resnet18(4),
}


@pytest.fixture(params=NETS.values(), ids=NETS)
def model(request):
    return request.param().double()


@pytest.mark.parametrize("training", [True, False])
def test_outputs_and_gradients_stay(model, training):
    fast = accelerated(model.train(training))
    x = torch.randn(5, 3, 6, 6, dtype=F64)
    results = []
    for net in (fast, model):
        torch.manual_seed(7)  # the same dropout masks
        results.append(twice(net, [x], list(net.parameters())))
    assert_same(*results, rtol=1e-8)
    for (name, one), other in zip(fast.state_dict().items(), model.state_dict().values(), strict=True):
        torch.testing.assert_close(one, other, msg=name)


def test_what_a_model_keeps(model):
    """Names, hooks and modes stay; copies and pickles work; all is undone."""
    kinds = [type(m) for m in model.modules()]
    parameters, modes = list(model.named_parameters()), [m.training for m in model.eval().modules()]
    report = ff.accelerate(model)
    assert set(report.swapped) == {
        n for n, m in model.named_modules() if isinstance(m, layers.Conv | layers.BatchNorm)
    }
    assert all(a == b and p is q for (a, p), (b, q) in zip(parameters, model.named_parameters(), strict=True))
    assert [m.training for m in model.modules()] == modes
    assert not ff.accelerate(model).swapped  # nothing is left to do
    x = torch.randn(5, 3, 6, 6, dtype=F64)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for other in (copy.deepcopy(model), torch.load(file, weights_only=False)):
        assert [type(m) for m in other.modules()] == [type(m) for m in model.modules()]
        assert torch.equal(other(x), model(x))
    assert ff.decelerate(model) is model
    assert [type(m) for m in model.modules()] == kinds
    assert not any("channels_last" in vars(m) for m in model.modules() if isinstance(m, nn.Conv2d))


def test_what_is_left_and_why():
    class Own(nn.BatchNorm2d):
        def forward(self, x):
            return super().forward(x) * 2

    patched = nn.Conv2d(4, 4, 1)
    patched.forward = lambda x: x
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3, padding="same"), Own(4), nn.Conv2d(4, 4, 3, padding=1, padding_mode="circular"),
        nn.SyncBatchNorm(4), patched, nn.utils.parametrizations.weight_norm(nn.Conv2d(4, 4, 1)), nn.LayerNorm(3),
    )  # fmt: skip
    kinds = [type(m) for m in model]
    report = ff.accelerate(model)
    assert set(report.left) == {"0", "1", "2", "3", "4", "5"}
    assert not report.swapped
    assert [type(m) for m in model] == kinds
    assert "same" in report.left["0"]
    assert "Own" in str(report)
    assert "replaced" in report.left["4"]
    with pytest.raises(TypeError, match="model"):
        ff.accelerate([model])


@pytest.mark.parametrize("watched", [0, 1])
def test_a_hook_sees_what_it_saw(watched):
    """A normalisation and its ReLU are not taken together under a hook on either."""
    model, seen = nn.Sequential(nn.BatchNorm1d(3), nn.ReLU()), []
    x = torch.randn(6, 3)
    model[watched].register_forward_hook(lambda module, inputs, output: seen.append(output.detach().clone()))
    expected = model(x)
    ff.accelerate(model)
    assert torch.allclose(model(x), expected)
    assert torch.allclose(*seen)
    assert torch.allclose(model[:1](x), seen[0] if watched == 0 else model[0](x))


def test_under_func(model):
    """The gradient of a function of input gradients, of stacked members and one by one."""
    if any(isinstance(m, nn.Dropout) for m in model.modules()):
        model.eval()
    x = torch.randn(4, 3, 6, 6, dtype=F64)

    def objective(net, parameters, buffers):
        def summed(x, buffers):  # which each level of grad has to be handed: they are written to
            return functional_call(net, (parameters, buffers), (x,)).sin().sum()

        return grad(summed)(x, buffers).square().sum() + summed(x, buffers)

    results = []
    for net in (accelerated(model), model):
        members = [copy.deepcopy(net) for _ in range(2)]
        for number, member in enumerate(members):
            with torch.no_grad():
                [p.add_(0.1 * number) for p in member.parameters()]
        parameters, buffers = stack_module_state(members)
        stacked = vmap(grad(functools.partial(objective, net)))(parameters, buffers)
        alone = [
            grad(functools.partial(objective, net))(dict(m.named_parameters()), dict(m.named_buffers()))
            for m in members
        ]
        for name, together in stacked.items():
            torch.testing.assert_close(together, torch.stack([own[name] for own in alone]), rtol=1e-7, atol=1e-9)
        results.append([stacked[name] for name in stacked])
    assert_same(*results, rtol=1e-8)


def test_forward_mode(model):
    x, tangent = torch.randn(2, 5, 3, 6, 6, dtype=F64)
    model.eval()
    for one, other in zip(*(jvp(net, (x,), (tangent,)) for net in (accelerated(model), model)), strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("make", [lambda: models.cnn(4, 3, 8), separable], ids=["cnn", "separable"])
def test_autocast(make):
    """In bfloat16 as far from float64 as PyTorch's own layers are."""
    model = make()
    x, y = torch.randn(16, 3, 8, 8), torch.randint(4, (16,))

    def step(net, enabled):
        point = x.to(next(net.parameters()).dtype).requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            out = net(point)
        (J,) = torch.autograd.grad(out.gather(1, y[:, None]).sum(), point, create_graph=True)
        every = (F.cross_entropy(out, y), J)
        return torch.cat(
            [g.flatten() for g in torch.autograd.grad(every, list(net.parameters()), (None, J.detach()))]
        )

    exact = step(copy.deepcopy(model).double(), False)
    fast, plain = (step(net, True) for net in (accelerated(model), copy.deepcopy(model)))
    assert (fast - exact).norm() <= 2 * (plain - exact).norm() + 0.01 * exact.norm()


def test_compiled():
    torch._dynamo.reset()
    model = models.cnn(4, 3, 4)
    x = torch.randn(5, 3, 8, 8)
    compiled = torch.compile(accelerated(model), backend="aot_eager")
    torch.testing.assert_close(compiled(x), model(x))


def test_float32_step_of_resnet18_is_as_accurate_as_pytorchs():
    """The parameters' gradients of a training step, against float64."""
    x, y = torch.randn(8, 3, 16, 16), torch.randint(10, (8,))

    def step(net):
        dtype = next(net.parameters()).dtype
        point = x.to(dtype).requires_grad_()
        out = net(point)
        (J,) = torch.autograd.grad(out.gather(1, y[:, None]).sum(), point, create_graph=True)
        cotangent = J.detach() / J.detach().flatten(1).norm(dim=1).view(-1, 1, 1, 1)
        pair = (F.cross_entropy(out, y), J)
        return torch.cat([g.flatten() for g in torch.autograd.grad(pair, list(net.parameters()), (None, cotangent))])

    model = models.resnet18(16)
    exact = step(copy.deepcopy(model).double())
    plain, fast = step(copy.deepcopy(model)), step(accelerated(model))
    assert (fast - exact).norm() <= 2 * (plain - exact).norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_running_averages_over_all_batches(dtype):
    plain = nn.BatchNorm1d(5, momentum=None).to(dtype)
    fast = copy.deepcopy(plain)
    ff.accelerate(fast)
    for size in (4, 7, 3):
        x = torch.randn(size, 5, dtype=dtype)
        plain(x), fast(x)
    for one, other in zip(fast.buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(one, other)
