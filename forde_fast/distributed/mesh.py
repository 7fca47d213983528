"""The ranks of a mesh: which members and samples are theirs, and the sums that they share.

`member` x `data`: ranks of one data group hold the same members and differ in samples, ranks of one member group the
other way round. Rank a * data + b has the members of row a and the samples of column b: the data group, through which
whole gradients go, is of neighbours, most often within one machine; only input gradients go further.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh

from forde_fast import validation
from forde_fast.distributed.meeting import meet
from forde_fast.distributed.parts import best_parts, cut
from forde_fast.distributed.store import join
from forde_fast.ensemble import Ensemble
from forde_fast.second_order import accelerate
from forde_fast.second_order.layers import BatchNorm
from forde_fast.step import Alone, Objective
from forde_fast.strategies import Graphs
from forde_fast.validation import expect


class Mesh(Alone):
    """All ranks of torch.distributed's default group as member x data; opened from torchrun's environment if need be.

    members      M, of the whole ensemble; need not divide by the ranks
    data_parts   ranks that share a member's batch; divides the number of ranks. None: whatever leaves the busiest
                 rank the least to do and, among equals, splits the members, for which less is sent
    synchronise  BatchNorm over the whole batch, as in one process (and the published code); False: each rank's part
                 has statistics of its own, and what is kept of a member is rank b = 0's
    device       "cpu" (gloo) or "cuda" (nccl; each process the GPU of its LOCAL_RANK)

    own          slice of the M members that this rank has
    grid         the DeviceMesh

    Raises ValueError for a number of parts that the ranks do not divide into, or that leaves a row without a member.
    """

    def __init__(self, members: int, data_parts: int | None = None, synchronise: bool = True, device: str = "cpu"):
        validation.whole(members, "members")
        kind = torch.device(device).type
        if not dist.is_initialized():
            join("cpu:gloo,cuda:nccl" if kind == "cuda" else "gloo")
        ranks = dist.get_world_size()
        parts = best_parts(members, ranks) if data_parts is None else data_parts
        validation.whole(parts, "data_parts")
        expect(ranks % parts == 0, "data_parts", f"a divisor of the {ranks} ranks", parts)
        rows = ranks // parts
        enough = f"at least {-(-ranks // members)}, so that each rank has one of {members} members"
        expect(rows <= members, "data_parts", enough, parts)
        self.total_members, self.synchronise = members, synchronise
        self.rank, self.ranks = dist.get_rank(), ranks
        self.grid = init_device_mesh(kind, (rows, parts), mesh_dim_names=("member", "data"))
        self.row, self.column = self.grid.get_local_rank("member"), self.grid.get_local_rank("data")
        self.member_group, self.data_group = self.grid.get_group("member"), self.grid.get_group("data")
        self.rows, self.parts = rows, parts
        self.counts = [part.stop - part.start for part in cut(members, rows)]  # members of each row
        self.own = cut(members, rows)[self.row]
        self._waiting: list[dist.Work] = []
        self._asked: tuple[dist.Work, Tensor] | None = None

    def ensemble(
        self, make_model: Callable[[], nn.Module], seed: int = 0, shared: str | Sequence[str] = ()
    ) -> Ensemble:
        """This rank's members of `Ensemble(make_model, M, seed, shared)`: all are made, so that they are the same
        ones, and the others forgotten one by one."""
        with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
            torch.manual_seed(seed)
            own = range(self.total_members)[self.own]
            made = (make_model() for _ in range(self.total_members))
            return Ensemble.from_modules([module for i, module in enumerate(made) if i in own], shared)

    def check(self, ensemble: Ensemble, strategy: str) -> None:
        """Raises ValueError for other members than this rank's, for a strategy by which ranks would come to compute
        differently, and for one under which BatchNorm cannot be synchronised."""
        expect(strategy != "auto", "strategy", "loop, stacked or streams, the same on all ranks", strategy)
        own = self.own.stop - self.own.start
        expect(len(ensemble) == own, "ensemble", f"this rank's {own} of {self.total_members} members", len(ensemble))
        reduces = self.parts > 1 and self.synchronise and strategy == "stacked"
        normalised = [one for one in ensemble.modules() if isinstance(one, nn.modules.batchnorm._BatchNorm)]
        able = "loop or streams where BatchNorm is synchronised over parts of a batch (or --no-sync-batchnorm)"
        expect(not (reduces and normalised), "strategy", able, strategy)

    def prepare(self, ensemble: Ensemble, strategy: str) -> None:
        """`check`, and synchronise the ensemble's BatchNorm layers where that is asked for.

        Raises ValueError besides for a BatchNorm that cannot be synchronised.
        """
        self.check(ensemble, strategy)
        for part in ensemble.shared_parts:  # as member 0 has them
            row = ensemble.flat[0, part].clone()
            dist.broadcast(row, group=self.member_group, group_src=0)
            ensemble.flat[:, part] = row
        if self.parts == 1 or not self.synchronise:
            return
        report = accelerate(ensemble)
        for name, module in ensemble.named_modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                fits, got = isinstance(module, BatchNorm), f"{name}: {report.left.get(name, '')}"
                expect(fits, "synchronise", "batch normalisations that can be, or False", got)
                module.reduce = self.over_parts

    def over_parts(self, sums: Tensor) -> Tensor:
        """[rows, C] of this rank -> added up over the ranks with the same members."""
        sums = sums.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(sums, group=self.data_group)
        return sums

    # ------------------------------------------------------------ what a step asks

    def members(self, ensemble: Ensemble) -> int:
        return self.total_members

    def part(self, samples: int) -> slice:
        expect(samples >= self.parts, "x", f"at least {self.parts} samples, one for each part", samples)
        return cut(samples, self.parts)[self.column]

    def weighted(self, loss: Callable, samples: int) -> Callable:
        part = self.part(samples)
        share = (part.stop - part.start) / samples
        return loss if share == 1 else lambda outputs, y: loss(outputs, y) * share

    def repel(self, graphs: Graphs, objective: Objective, samples: int, of: int):
        return meet(self, graphs, objective, samples, of)

    def add(self, rows: Tensor) -> None:
        if self.parts > 1:
            self._waiting.append(dist.all_reduce(rows, group=self.data_group, async_op=True))

    def added(self) -> None:
        for work in self._waiting:
            work.wait()
        self._waiting.clear()

    @torch.no_grad()
    def average_shared_(self, ensemble: Ensemble, g: Tensor) -> None:
        for part in ensemble.shared_parts:
            sums = g[:, part].sum(0)
            dist.all_reduce(sums, group=self.member_group)
            g[:, part] = sums / self.total_members

    def total(self, sum: Tensor) -> Tensor:
        exact = sum.detach().double()
        dist.all_reduce(exact)
        return exact.to(sum.dtype)

    def norm(self, rows: Tensor) -> Tensor:
        return (self.total(rows.double().square().sum()) / self.parts).sqrt().to(rows.dtype)

    def mean(self, numbers: Tensor) -> Tensor:
        sums = torch.stack([numbers.double().sum(), numbers.new_tensor(numbers.numel(), dtype=torch.float64)])
        sums = self.total(sums)
        return (sums[0] / sums[1]).to(numbers.dtype)

    # ------------------------------------------------------------ beside the step

    def agree(self, number: int) -> int:
        """The largest number that any rank gave in the call before; 0 in the first. Nobody waits for a slower rank
        here, and all act on the same step."""
        agreed, self._asked = self._asked, None
        if agreed is not None:
            agreed[0].wait()
        own = torch.tensor([number])
        self._asked = dist.all_reduce(own, dist.ReduceOp.MAX, async_op=True), own
        return int(agreed[1]) if agreed is not None else 0

    def told(self, call: Callable[[], object]) -> object:
        """What `call` returns on rank 0, something that JSON has, on all ranks; or the ValueError or OSError that it
        raises there, on all."""
        said = b""
        if self.rank == 0:
            try:
                said = json.dumps([call()]).encode()
            except (ValueError, OSError) as error:
                said = json.dumps({"error": str(error)}).encode()
        length = torch.tensor([len(said)])
        dist.broadcast(length, 0)
        content = torch.empty(int(length), dtype=torch.uint8)
        if said:
            content = torch.frombuffer(bytearray(said), dtype=torch.uint8)
        dist.broadcast(content, 0)
        found = json.loads(bytes(content.tolist()))
        if isinstance(found, dict):
            raise ValueError(found["error"])
        return found[0]

    def leave(self) -> None:
        """The last call, for which all ranks wait. The group stays, for other meshes: `part` ends it with the
        program."""
        self.total(torch.zeros(()))
        self._asked = self.grid = self.member_group = self.data_group = None

    def gather_members(self, rows: Tensor) -> Tensor:
        """rows [M_own, ...] -> [M, ...] on every rank of the member group."""
        most = max(self.counts)
        padded = rows.new_zeros(most, *rows.shape[1:])
        padded[: len(rows)] = rows
        found = [torch.empty_like(padded) for _ in self.counts]
        dist.all_gather(found, padded, group=self.member_group)
        return torch.cat([part[:count] for part, count in zip(found, self.counts, strict=True)])

    def gather_groups(self, d: Tensor) -> tuple[Tensor, slice]:
        """d [M, M, G] of this rank's samples -> of all, on every rank, and where in it this rank's are."""
        sizes = [torch.empty(1, dtype=torch.int64, device=d.device) for _ in range(self.ranks)]
        dist.all_gather(sizes, torch.full_like(sizes[0], d.shape[2]))
        most = int(max(sizes))
        padded = d.new_zeros(*d.shape[:2], most)
        padded[..., : d.shape[2]] = d
        found = [torch.empty_like(padded) for _ in sizes]
        dist.all_gather(found, padded)
        begin = int(sum(sizes[: self.rank]))
        whole = torch.cat([part[..., : int(size)] for part, size in zip(found, sizes, strict=True)], -1)
        return whole, slice(begin, begin + d.shape[2])
