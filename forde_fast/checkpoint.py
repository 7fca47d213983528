"""State on disk: safetensors, never pickle, and nothing overwritten before the new file is whole."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load, save
from torch import Tensor, nn

from forde_fast.ensemble import Ensemble
from forde_fast.files import write
from forde_fast.validation import expect

KEPT = 2  # checkpoints: should the last one be damaged, there is one before it
DIGITS = 16  # of the SHA-256 in a checkpoint's name


def save_ensemble(path: str | Path, ensemble: Ensemble) -> None:
    """Every member's parameters and buffers, as `members.<i>.<name>`: what the ensemble's state_dict has."""
    _save_module(path, ensemble, {"forde_fast.members": str(len(ensemble))})


def save_member(path: str | Path, ensemble: Ensemble, index: int) -> None:
    """One member alone: plain PyTorch reads it by `module.load_state_dict(safetensors.torch.load_file(path))`."""
    expect(0 <= index < len(ensemble), "index", f"0 to {len(ensemble) - 1}", index)
    _save_module(path, ensemble.member(index))


def _save_module(path: str | Path, module: nn.Module, metadata: dict[str, str] | None = None) -> None:
    write(path, save({name: _own(tensor) for name, tensor in module.state_dict().items()}, metadata))


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
    try:
        ensemble.check_state(tensors)
    except ValueError as error:
        raise ValueError(f"{error} in {path}") from None
    with torch.no_grad():
        ensemble.load_state_dict(tensors)


class Checkpoints:
    """The last KEPT states of a training in one folder, as `<step>-<SHA-256>.safetensors`.

    The checksum is part of the name: it and the content appear by the same rename, whole or not at all.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)

    def write(self, state: dict) -> Path:
        """Keep `Trainer.state_dict()`; the oldest beyond KEPT go. On OSError those that were there still are."""
        self.folder.mkdir(parents=True, exist_ok=True)
        content = pack(state)
        path = self.folder / f"{state['steps']:08d}-{_checksum(content)}.safetensors"
        write(path, content)
        for old in self.paths()[:-KEPT]:
            old.unlink()
        return path

    def paths(self) -> list[Path]:
        """The checkpoints, oldest first."""
        return sorted(self.folder.glob("*-*.safetensors"))

    def read(self) -> tuple[dict | None, list[Path]]:
        """The last whole state, None where there is no checkpoint; and the damaged ones, each renamed to `.damaged`.

        Raises ValueError where all are damaged.
        """
        damaged = []
        for path in reversed(self.paths()):
            content = path.read_bytes()
            if _checksum(content) == path.stem.partition("-")[2]:
                return unpack(content), damaged
            damaged.append(path)
            path.rename(f"{path}.damaged")
        expect(not damaged, "checkpoints", "one that is whole", f"only damaged ones in {self.folder}")
        return None, damaged


def pack(state: dict) -> bytes:
    """Dicts and lists of tensors, numbers, texts and None in one safetensors file: what is no tensor as JSON."""
    tensors: dict[str, Tensor] = {}

    def strip(value, name):
        if isinstance(value, Tensor):
            tensors[name] = _own(value)
            return {"tensor": name}
        if isinstance(value, dict):
            return {"dict": {key: strip(item, f"{name}/{key}") for key, item in value.items()}}
        if isinstance(value, (list, tuple)):
            return [strip(item, f"{name}/{i}") for i, item in enumerate(value)]
        return value

    return save(tensors, {"forde_fast.state": json.dumps(strip(state, ""))})


def unpack(content: bytes) -> dict:
    """What `pack` was given; keys that were numbers, and tuples, come back as texts and lists."""
    tensors, size = load(content), int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])

    def fill(value):
        if isinstance(value, list):
            return [fill(item) for item in value]
        if isinstance(value, dict):
            name = value.get("tensor")
            return tensors[name] if name is not None else {key: fill(item) for key, item in value["dict"].items()}
        return value

    return fill(json.loads(header["__metadata__"]["forde_fast.state"]))


def _own(tensor: Tensor) -> Tensor:
    """On the CPU and in memory of its own: safetensors takes no views of one buffer."""
    return tensor.detach().to("cpu", copy=True).contiguous()


def _checksum(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:DIGITS]
