"""Within a member group: rows of all members, cut into shares, to the ranks whose shares they are, and back."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from forde_fast.distributed.parts import cut


class Exchange:
    """One round per member of a rank; ranks that have fewer than others take part in the last round with nothing.

    Both ways together a rank sends 2 (ranks - 1) / ranks of its own rows. Members stand in the order in which they
    come, round by round, which is the same for all ranks.
    """

    def __init__(self, mesh):
        self.mesh, self.rounds = mesh, max(mesh.counts)
        self.inbox: list[tuple[Tensor, dist.Work | None]] = []
        self.back: dict[int, tuple[Tensor, dist.Work | None]] = {}

    def send(self, rows: Tensor) -> None:
        """The next member's [N, K], without waiting: while they are on their way the next one is computed."""
        if not self.inbox:
            self.template = rows
            self.shares = [part.stop - part.start for part in cut(len(rows), self.mesh.rows)]
            self.share = self.shares[self.mesh.row]
        senders = self._senders(len(self.inbox))
        own = self.shares if senders[self.mesh.row] else [0] * len(senders)
        out = rows.new_empty(sum(senders) * self.share, rows.shape[1])
        self.inbox.append((out, self._all_to_all(out, rows, [self.share * sends for sends in senders], own)))

    def received(self) -> Tensor:
        """This rank's share of all members' rows, [M, share, K]."""
        while len(self.inbox) < self.rounds:
            self.send(self.template[:0])
        for _, work in self.inbox:
            _wait(work)
        return torch.cat([out for out, _ in self.inbox]).view(-1, self.share, self.template.shape[1])

    def send_back(self, rows: Tensor) -> None:
        """[M, share, K], in the order of `received`: the last round first, as members are pulled back."""
        for number in reversed(range(self.rounds)):
            senders, begin = self._senders(number), sum(sum(self._senders(k)) for k in range(number))
            own = self.shares if senders[self.mesh.row] else [0] * len(senders)
            part = rows[begin : begin + sum(senders)].reshape(-1, rows.shape[2])
            out = rows.new_empty(sum(own), rows.shape[2])
            self.back[number] = (
                out,
                self._all_to_all(out, part, own, [self.share * sends for sends in senders]),
            )

    def sent_back(self, number: int) -> Tensor:
        """Of this rank's member `number`, [N, K]."""
        out, work = self.back[number]
        _wait(work)
        return out

    def _senders(self, number: int) -> list[bool]:
        """Which ranks of the group have a member in this round."""
        return [count > number for count in self.mesh.counts]

    def _all_to_all(self, out: Tensor, rows: Tensor, out_splits: list[int], splits: list[int]) -> dist.Work | None:
        if self.mesh.rows == 1:
            out.copy_(rows)
            return None
        group = self.mesh.member_group
        return dist.all_to_all_single(out, rows.contiguous(), out_splits, splits, group, async_op=True)


def _wait(work: dist.Work | None) -> None:
    if work is not None:
        work.wait()
