"""Small networks get one thread, and what was there comes back."""

import pytest
import torch

from forde_fast import models, threads


@pytest.fixture(autouse=True)
def four_threads(threads_come_back):
    torch.set_num_threads(4)


def test_multiply_adds_are_those_of_matrices_and_kernels():
    net = torch.nn.Sequential(
        torch.nn.Conv2d(3, 5, 3), torch.nn.BatchNorm2d(5), torch.nn.Flatten(), torch.nn.Linear(80, 7)
    )
    x = torch.randn(2, 3, 6, 6)
    before = [tensor.clone() for tensor in net.state_dict().values()]
    assert threads.multiply_adds(net.train(), x) == 2 * (5 * 16 * 27 + 80 * 7)
    assert net.training
    assert all(map(torch.equal, before, net.state_dict().values()))
    assert not any(layer._forward_hooks for layer in net)


def test_a_small_network_gets_one_thread_and_a_large_one_all():
    for name, width, expected in (("mlp", 128, 1), ("resnet18", 16, 4)):
        with threads.suited(models.make(name, 10, (1, 28, 28), width), torch.zeros(128, 1, 28, 28)):
            assert torch.get_num_threads() == expected
        assert torch.get_num_threads() == 4


def test_threads_come_back_after_an_error():
    with pytest.raises(KeyboardInterrupt), threads.suited(torch.nn.Linear(2, 2), torch.zeros(1, 2)):
        raise KeyboardInterrupt
    assert torch.get_num_threads() == 4
