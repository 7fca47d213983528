"""python mesh_cases.py FOLDER [whole]: what several gloo processes compute, for test_distributed.py.

The processes start by fork, after the imports and after what one process alone computes, and go through worlds of 1
to 4 ranks. Prints, as JSON, case -> numbers, the largest that any rank found. With `whole` every method takes ten
steps on every grid, and what is off by 1e-10 or more ends it with an error; that takes minutes.
"""

import functools
import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
import torch.fx.experimental.symbolic_shapes  # autograd's first call imports it: here once, not in every child
import trainer_cases
from torch.multiprocessing import start_processes
from trainer_cases import Published, golden, published_parameters

import forde_fast as ff
from forde_fast import methods, scaling
from forde_fast.distributed import Mesh
from forde_fast.rule import Rule
from forde_fast.second_order.layers import BatchNorm

trainer_cases.GOLDEN = dict(trainer_cases.GOLDEN)  # an open file's place would be the same for all children

GRIDS = ((1, 1), (2, 1), (2, 2), (3, 1), (3, 3), (4, 1), (4, 2), (4, 4))  # ranks, data parts
SOME = ((3, 1), (4, 2))  # members that do not divide; both split
MEMBERS = 4


def low_rank(tail=0.0):
    rank = golden("eigenvectors").shape[0] // 4
    return ff.PCA(golden("eigenvectors")[:, :rank], golden("eigenvalues")[:rank], tail)


WHOLE = "whole" in sys.argv

# name -> options of the trainer
METHODS = {
    "published": {"lengthscale": ff.PCA(golden("eigenvectors"), golden("eigenvalues"))},
    "identity": {},
    "low rank": {"lengthscale": low_rank()},
    "low rank and tail": {"lengthscale": low_rank(0.3)},
    "cosine": {"lengthscale": ff.Cosine.fit(golden("images").flatten(0, 1))},
    "one bandwidth": {"method": ff.Method(ff.InputGradients(), bandwidth=ff.Median(over="batch"))},
    "first's bandwidth": {"method": ff.Method(ff.InputGradients(), bandwidth=ff.Median(owner="first"))},
    "log-probability": {"method": ff.Method(ff.InputGradients("log_probability"), normalize=False)},
    "some samples": {"repulsion_samples": 5, "repulsion_every": 2, "repulsion_weight": 3.0},
    "adam": {"optimizer": lambda parameters: torch.optim.Adam(parameters, lr=1e-3)},
} | {name: {"method": name} for name in methods.METHODS if name != "forde"}
STEPS = {name: 10 if WHOLE else 3 if name == "some samples" else 2 for name in METHODS} | {"published": 10}


def train(name: str, mesh=None, steps: int | None = None):
    """The trainer after its steps, and the logs."""
    steps, options = STEPS[name] if steps is None else steps, METHODS[name]
    modules = [Published(float(golden("bn_eps"))).double() for _ in range(MEMBERS)]
    for i, module in enumerate(modules):
        module.load_state_dict({n: p[i] for n, p in published_parameters("start").items()}, strict=False)
    if mesh is not None:
        modules, options = modules[mesh.own], options | {"mesh": mesh}
    published = {name: float(golden(name)) for name in ("eps", "lr", "momentum", "weight_decay")}
    ensemble = ff.Ensemble.from_modules(modules, methods.SHARED.get(name, ()))
    trainer = ff.Trainer(ensemble, **published, **options)
    batches = zip(golden("images")[:steps], golden("labels"), strict=False)
    return trainer, [trainer.step(x, y) for x, y in batches]


def off(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found - wanted).double().norm() / wanted.double().norm())


def trajectory(name: str, parts: int) -> dict[str, float]:
    """How far parameters, running statistics and logs are from one process's, at worst."""
    mesh = Mesh(MEMBERS, parts)
    trainer, logs = train(name, mesh)
    alone, wanted = ALONE[name]
    buffers = zip(trainer.ensemble.members, alone.ensemble.members[mesh.own], strict=True)
    log, wanted = (torch.stack([torch.stack(one) for one in each]) for each in (logs, wanted))
    if name == "low rank":  # the cosine is then that of the coordinates
        log[:, 3] = wanted[:, 3]
    statistics = [off(a, b) for own, other in buffers for a, b in zip(own.buffers(), other.buffers(), strict=True)]
    return {
        "parameters": off(mesh.gather_members(trainer.ensemble.flat), alone.ensemble.flat),
        "statistics": max(statistics),
        "log": float(((log - wanted).abs() / (wanted.abs() + 1e-3)).max()),
    }


class Counted:
    """Bytes that are handed to torch.distributed within `with Counted(mesh) as sent`, by what they are for."""

    calls = "all_reduce", "all_to_all_single", "all_gather"

    def __init__(self, mesh):
        kinds = "exchange", "gradients", "norms", "sums", "gathered", "shared", "log"
        self.mesh, self.bytes = mesh, dict.fromkeys(kinds, 0)

    def __enter__(self):
        self.own = {name: getattr(dist, name) for name in self.calls}
        for name in self.calls:
            setattr(dist, name, getattr(self, name))
        return self.bytes

    def __exit__(self, *exception):
        for name, own in self.own.items():
            setattr(dist, name, own)

    def all_reduce(self, tensor, *rest, group=None, async_op=False, **options):
        if group is None:
            kind = "sums" if tensor.ndim > 1 else "log"
        elif group is self.mesh.member_group:
            kind = "shared"
        else:
            assert group is self.mesh.data_group
            kind = "gradients" if async_op else "norms"
        if dist.get_world_size(group) > 1:
            self.bytes[kind] += tensor.nbytes
        return self.own["all_reduce"](tensor, *rest, group=group, async_op=async_op, **options)

    def all_to_all_single(self, out, rows, out_splits, splits, group, **options):
        assert group is self.mesh.member_group
        kept = splits[self.mesh.row] * rows[:1].nbytes if len(rows) else 0
        self.bytes["exchange"] += rows.nbytes - kept
        return self.own["all_to_all_single"](out, rows, out_splits, splits, group, **options)

    def all_gather(self, found, tensor, *rest, **options):
        self.bytes["gathered"] += tensor.nbytes if self.mesh.ranks > 1 else 0
        return self.own["all_gather"](found, tensor, *rest, **options)


def step_of(name: str, trainer) -> scaling.Step:
    """What the model is told of a method."""
    space, bandwidth = trainer.objective.method.space, trainer.objective.method.bandwidth
    split = space and getattr(space, "split", "samples")
    sent = {"low rank": low_rank().rank, "feature-rde": 12}.get(name)  # feature-rde's head has 12 inputs
    sent = sent or (golden("images")[0][0].numel() if split == "samples" else 5)  # classes
    return scaling.Step(
        MEMBERS, len(golden("images")[0]), trainer.ensemble.flat.shape[1], sent, split,
        whole=split == "samples" and (isinstance(bandwidth, Rule) or getattr(bandwidth, "over", "") == "batch"),
        directions=getattr(space, "directions", 0), shared=65 if trainer.ensemble.shared_parts else 0,
        channels=8 + 12, norms=2, itemsize=8,
    )  # fmt: skip


def bytes_of_a_step(name: str, parts: int) -> dict[str, float]:
    """How far the model's bytes are from those counted, over all ranks; and those of this one."""
    mesh = Mesh(MEMBERS, parts)
    trainer, _ = train(name, mesh, 1)  # the first one measures besides
    with Counted(mesh) as counted:
        trainer.step(golden("images")[4], golden("labels")[4])
    model = scaling.payloads(step_of(name, trainer), mesh.rows, mesh.parts, mesh.rank)
    off = torch.tensor([abs(counted[kind] - model[kind]) for kind in counted], dtype=torch.float64)
    return {"off": float(mesh.total(off).sum()), **counted}


SENT = [name for name in METHODS if name not in ("some samples", "adam")]
CASES = {f"trajectory of {name}": functools.partial(trajectory, name) for name in METHODS}
CASES |= {f"bytes of {name}": functools.partial(bytes_of_a_step, name) for name in SENT}


def grids_of(name: str):
    return GRIDS if WHOLE or name == "trajectory of published" else SOME


def child(rank: int, folder: Path) -> None:
    found = {}
    for world in sorted({world for world, _ in GRIDS if rank < world}):
        store = dist.FileStore(str(folder / f"world{world}"), world)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=world)
        for name, case in CASES.items():
            for parts in (parts for ranks, parts in grids_of(name) if ranks == world):
                found[f"{name}: {world} ranks, {parts} parts"] = case(parts)
        dist.destroy_process_group()
    (folder / f"{rank}.json").write_text(json.dumps(found))


def main(folder: Path) -> None:
    start_processes(child, (folder,), nprocs=max(GRIDS)[0], start_method="fork")
    found = {}
    for path in folder.glob("*.json"):
        for name, numbers in json.loads(path.read_text()).items():
            worst = found.setdefault(name, numbers)
            found[name] = {what: max(number, worst[what]) for what, number in numbers.items()}
    print(json.dumps(found))
    if WHOLE:
        sys.exit("\n".join(f"{name}: {numbers}" for name, numbers in found.items() if bad(name, numbers)) or 0)


def bad(name: str, off: dict) -> bool:
    limits = {"off": 0.5} if name.startswith("bytes") else {"parameters": 1e-10, "statistics": 1e-10, "log": 1e-8}
    return any(not off[what] < limit for what, limit in limits.items())


if __name__ == "__main__":
    torch.set_num_threads(1)
    BatchNorm.smallest = 0
    ALONE = {name: train(name) for name in METHODS}
    main(Path(sys.argv[1]))
