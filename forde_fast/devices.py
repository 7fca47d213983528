"""Which device a name stands for."""

import os

import torch

from forde_fast import distributed
from forde_fast.validation import expect, reason_of


def is_here(device: str) -> bool:
    try:
        find_device(device)
    except ValueError:
        return False
    return True


def find_device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and distributed.launched():  # one for each process of this machine
        name = f"cuda:{os.environ['LOCAL_RANK']}"
    expected, got = "cpu, cuda or cuda:N that is here", repr(name)[:80]
    expect(name.partition(":")[0] in ("cpu", "cuda"), "device", expected, got)
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device: expected {expected}, got {got} ({reason_of(error, 80)})") from None
    return device
