"""State on disk: safetensors, never pickle, and nothing overwritten before the new file is whole."""

from __future__ import annotations

import hashlib
import json
import re
import threading
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load, save
from torch import Tensor, nn

from forde_fast.ensemble import Ensemble
from forde_fast.files import write
from forde_fast.validation import expect, reason_of

KEPT = 2  # checkpoints: should the last one be damaged, there is one before it
DIGITS = 16  # of the SHA-256 in a checkpoint's name
FOREIGN = (LookupError, TypeError, AttributeError, ValueError, RuntimeError)  # what a file of other content leads to


def save_ensemble(path: str | Path, ensemble: Ensemble) -> None:
    """Every member's parameters and buffers, as `members.<i>.<name>`: what the ensemble's state_dict has."""
    expect(isinstance(ensemble, Ensemble), "ensemble", "an Ensemble", type(ensemble).__name__, TypeError)
    _save_module(path, ensemble, {"forde_fast.members": str(len(ensemble))})


def save_member(path: str | Path, ensemble: Ensemble, index: int) -> None:
    """One member alone: plain PyTorch reads it by `module.load_state_dict(safetensors.torch.load_file(path))`."""
    _save_module(path, ensemble.member(index))


def _save_module(path: str | Path, module: nn.Module, metadata: dict[str, str] | None = None) -> None:
    write(path, save({name: _own(tensor) for name, tensor in module.state_dict().items()}, metadata))


def load_ensemble(path: str | Path, ensemble: Ensemble) -> None:
    """Read what `save_ensemble` wrote into an ensemble of the same members.

    Raises FileNotFoundError, and ValueError for a file of another kind or for other members; the ensemble is
    then as it was.
    """
    expect(isinstance(ensemble, Ensemble), "ensemble", "an Ensemble", type(ensemble).__name__, TypeError)
    expect(Path(path).is_file(), "path", "a checkpoint file", path, FileNotFoundError)
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"path: expected a checkpoint in safetensors, got {path} ({reason_of(error)})") from None
    try:
        ensemble.check_state(tensors)
    except ValueError as error:
        raise ValueError(f"{error} in {path}") from None
    with torch.no_grad():
        ensemble.load_state_dict(tensors)


class Checkpoints:
    """The last KEPT states of a training in one folder, each in as many pieces as there are ranks that write:
    `<step>-<rank>of<ranks>-<SHA-256>.safetensors`.

    The checksum is part of the name: it and the content appear by the same rename, whole or not at all. A state is
    whole when all its pieces are: ranks need not wait for each other, and a kill between two pieces loses only what
    was not whole yet. Writing happens beside the training, of a copy that `begin` makes.
    """

    def __init__(self, folder: str | Path, rank: int = 0, ranks: int = 1):
        self.folder, self.rank, self.ranks = Path(folder), rank, ranks
        self.error: Exception | None = None  # of a write that failed; raised by the next call
        self._writing: threading.Thread | None = None

    def begin(self, state: dict, own: range | None = None, first: bool = True) -> None:
        """Keep `Trainer.state_dict()`, of which tensors are copied before this returns; the oldest beyond KEPT go.

        own    the numbers that this rank's members have among all; None: they are all
        first  whether no rank before this one has the same members

        Waits for the write before it. On OSError, raised by the next call, those that were there still are.
        """
        self.finish()
        state = piece(state, range(len(state["velocity"])) if own is None else own, first)
        copy, steps = copied(state), state["steps"]
        self._writing = threading.Thread(target=self._write, args=(copy, steps), name="checkpoint")
        self._writing.start()

    def finish(self) -> None:
        """Wait for what was begun. Raises OSError where it failed."""
        if self._writing is not None:
            self._writing.join()
            self._writing = None
        if self.error is not None:
            error, self.error = self.error, None
            raise error

    def write(self, state: dict) -> None:
        """`begin` and `finish`."""
        self.begin(state)
        self.finish()

    def _write(self, state: dict, steps: int) -> None:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            content = pack(state)
            name = f"{steps:08d}-{self.rank}of{self.ranks}-{_checksum(content)}.safetensors"
            write(self.folder / name, content)
            if self.rank == 0:
                self._forget()
        except Exception as error:  # whatever it is belongs to the training, not to this thread
            self.error = error

    def _forget(self) -> None:
        """Remove what is older than the last KEPT whole states."""
        whole = self.steps()
        for path in self.paths() if len(whole) >= KEPT else ():
            if _place(path)[0] < whole[-KEPT]:
                path.unlink(missing_ok=True)

    def paths(self) -> list[Path]:
        """The pieces, oldest first."""
        return sorted(path for path in self.folder.glob("*.safetensors") if _place(path) is not None)

    def pieces(self) -> dict[int, list[Path]]:
        """step -> the pieces of a state that has them all, in the ranks' order."""
        found: dict[tuple[int, int], dict[int, Path]] = {}
        for path in self.paths():
            step, rank, ranks = _place(path)
            found.setdefault((step, ranks), {})[rank] = path
        return {
            step: [own[rank] for rank in range(ranks)] for (step, ranks), own in found.items() if len(own) == ranks
        }

    def steps(self) -> list[int]:
        """Of the states that have all their pieces, oldest first; what is in them was not looked at."""
        return sorted(self.pieces())

    def check(self) -> tuple[int | None, list[Path]]:
        """The step of the last whole state, None where nothing was kept; and damaged pieces, renamed to `.damaged`.

        Raises ValueError where all states are damaged.
        """
        damaged, pieces = [], self.pieces()
        for step in reversed(sorted(pieces)):
            bad = [path for path in pieces[step] if not _is_whole(path, path.read_bytes())]
            if not bad:
                return step, damaged
            for path in bad:
                path.rename(f"{path}.damaged")
            damaged += bad
        expect(not damaged, "checkpoints", "one that is whole", f"only damaged ones in {self.folder}")
        return None, damaged

    def read(self, step: int, own: range | None = None) -> dict:
        """The state of a step that `check` found, of all members or, where `own` names some, with theirs alone.

        The generators' states are this rank's where as many ranks wrote as there are now, else None. Raises
        ValueError for pieces with the right checksum that are no pieces of one state.
        """
        states = []
        try:
            for path in self.pieces()[step]:
                state = unpack(path.read_bytes())
                states.append(only(state, own) if own is not None else state)
            return joined(states, self.rank if len(states) == self.ranks else None)
        except FOREIGN as error:
            got = f"others in {self.folder} ({reason_of(error)})"
            raise ValueError(f"checkpoints: expected the pieces of one state, got {got}") from None


def _place(path: Path) -> tuple[int, int, int] | None:
    """Step, rank and ranks in a piece's name; None for another file."""
    match = re.fullmatch(r"(\d{8,})-(\d+)of(\d+)-[0-9a-f]{16}", path.stem)
    return tuple(map(int, match.groups())) if match else None


# ---------------------------------------------------------------- pieces of a state


def piece(state: dict, own: range, first: bool = True) -> dict:
    """What one rank keeps of `Trainer.state_dict()`, with its members under the numbers `own` that they have among
    all; only the generators' states where another rank has the same members and is the `first`."""
    if not first:
        return {**state, "ensemble": {}, "velocity": state["velocity"][:0], "members": []}
    numbered = {}
    for name, tensor in state["ensemble"].items():
        members, index, rest = name.split(".", 2)
        numbered[f"{members}.{own[int(index)]}.{rest}"] = tensor
    return {**state, "ensemble": numbered, "members": list(own)}


def only(state: dict, own: range) -> dict:
    """Of a piece, the members `own`."""
    kept = [row for row, member in enumerate(state["members"]) if member in own]
    named = {name: tensor for name, tensor in state["ensemble"].items() if int(name.split(".", 2)[1]) in own}
    members = [state["members"][row] for row in kept]
    return {**state, "ensemble": named, "velocity": state["velocity"][kept], "members": members}


def joined(pieces: list[dict], rank: int | None) -> dict:
    """One `Trainer.state_dict()` of the members in some pieces, numbered from 0 on, with the generators' states of
    piece `rank` (None: none fits)."""
    rows = [row for one in pieces for row in zip(one["members"], one["velocity"], strict=True)]
    rows.sort(key=lambda row: row[0])
    numbers = {member: str(number) for number, (member, _) in enumerate(rows)}
    named = {}
    for one in pieces:
        for name, tensor in one["ensemble"].items():
            members, index, rest = name.split(".", 2)
            named[f"{members}.{numbers[int(index)]}.{rest}"] = tensor
    random = None if rank is None else pieces[rank]["random"]
    return {**pieces[0], "ensemble": named, "velocity": torch.stack([row for _, row in rows]), "random": random}


def read_member(folder: str | Path, index: int) -> dict[str, Tensor]:
    """One member of the last state in a run's `checkpoints`, as a plain module's `load_state_dict` takes it.

    Raises FileNotFoundError where there is none, ValueError where it is damaged or has no such member.
    """
    kept = Checkpoints(folder)
    step = max(kept.steps(), default=None)
    expect(step is not None, "folder", "a folder with checkpoints", folder, FileNotFoundError)
    start = f"/ensemble/members.{index}."
    for path in kept.pieces()[step]:
        content = path.read_bytes()
        expect(_is_whole(path, content), "folder", "whole checkpoints", f"{path}, of another checksum")
        found = {name.removeprefix(start): tensor for name, tensor in load(content).items() if name.startswith(start)}
        if found:
            return found
    raise ValueError(f"index: expected the number of a member in {folder}, got {index}")


def check_trained(state: dict, own: dict) -> None:
    """Raise ValueError, naming the first that is odd, unless `state` can take the place of a trainer's `own`; the
    ensemble's and the optimiser's part is left to them."""
    for name, value in own.items():
        found = state.get(name)
        if isinstance(value, Tensor):
            good = isinstance(found, Tensor) and found.shape == value.shape
        elif name == "position":
            counts = isinstance(found, (list, tuple)) and len(found) == len(value)
            good = counts and all(n is None or (type(n) is int and n >= 0) for n in found) and None not in found[:2]
        elif name == "random":
            good = found is None or _is_random(found)
        elif name == "optimizer":
            good = found is None or isinstance(found, dict)
        else:
            good = type(found) is type(value)
        got = list(found.shape) if isinstance(found, Tensor) else repr(found)[:60]
        expect(good and name in state, name, "what a trainer keeps of it", got)


def _is_random(states) -> bool:
    """Whether the first is one of a generator on the CPU."""
    try:
        torch.Generator().set_state(states[0])
    except FOREIGN:
        return False
    return all(isinstance(one, Tensor) for one in states)


def copied(value):
    """The same with every tensor copied to the CPU, in memory of its own."""
    if isinstance(value, Tensor):
        return _own(value)
    if isinstance(value, dict):
        return {key: copied(item) for key, item in value.items()}
    return [copied(item) for item in value] if isinstance(value, (list, tuple)) else value


def pack(state: dict) -> bytes:
    """Dicts and lists of tensors, numbers, texts and None in one safetensors file: what is no tensor as JSON."""
    tensors: dict[str, Tensor] = {}
    rest = json.dumps(_stripped(state, "", tensors))
    return save(tensors, {"forde_fast.state": rest})


def _stripped(value, name: str, tensors: dict[str, Tensor]):
    """The value without its tensors, which go to `tensors` (a parameter: a recursive closure is a cycle that would
    keep them until the garbage is collected, and a long run would grow)."""
    if isinstance(value, Tensor):
        alone = not value.is_cuda and value.is_contiguous() and value.untyped_storage().nbytes() == value.nbytes
        tensors[name] = value.detach() if alone else _own(value)
        return {"tensor": name}
    if isinstance(value, dict):
        return {"dict": {key: _stripped(item, f"{name}/{key}", tensors) for key, item in value.items()}}
    if isinstance(value, (list, tuple)):
        return [_stripped(item, f"{name}/{i}", tensors) for i, item in enumerate(value)]
    return value


def unpack(content: bytes) -> dict:
    """What `pack` was given; keys that were numbers, and tuples, come back as texts and lists.

    Raises ValueError for anything else.
    """
    try:
        state = _unpacked(content)
        expect(isinstance(state, dict), "state", "a dict", type(state).__name__)
        return state
    except (SafetensorError, *FOREIGN) as error:
        reason = reason_of(error)
        raise ValueError(f"state: expected what a training keeps, in safetensors, got another ({reason})") from None


def _unpacked(content: bytes):
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


def _is_whole(path: Path, content: bytes) -> bool:
    """Whether a piece's content is what its name says."""
    return _checksum(content) == path.stem.split("-")[2]


def _checksum(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:DIGITS]
