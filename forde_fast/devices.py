"""Which device a name stands for."""

import os

import torch

from forde_fast import distributed


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
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device: expected one that is here, got {name!r} ({str(error).splitlines()[0]})") from None
    return device
