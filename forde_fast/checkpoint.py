"""Parameters on disk: safetensors, never pickle, and nothing overwritten before the new file is whole."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from forde_fast.ensemble import Ensemble
from forde_fast.files import write
from forde_fast.validation import expect


def save_ensemble(path: str | Path, ensemble: Ensemble) -> None:
    """Every member's parameters and buffers, as `members.<i>.<name>`."""
    tensors = {name: tensor.detach().cpu().clone() for name, tensor in ensemble.state_dict().items()}
    write(path, save(tensors, metadata={"forde_fast.members": str(len(ensemble))}))


def load_ensemble(path: str | Path, ensemble: Ensemble) -> None:
    """Read what `save_ensemble` wrote into an ensemble of the same members.

    Raises FileNotFoundError, and ValueError for a file of another kind or for other members; the ensemble is
    then as it was.
    """
    expect(Path(path).is_file(), "path", "a checkpoint file", path, FileNotFoundError)
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"path: expected a checkpoint in safetensors, got {path} ({error})") from None
    own = {name: tuple(tensor.shape) for name, tensor in ensemble.state_dict().items()}
    found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    odd = sorted(name for name in own.keys() | found.keys() if own.get(name) != found.get(name))
    if odd:
        name = odd[0]
        raise ValueError(f"path: expected the ensemble's {name} {own.get(name)}, got {found.get(name)} in {path}")
    with torch.no_grad():
        ensemble.load_state_dict(tensors)
