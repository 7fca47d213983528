"""What a step on a mesh sends and how long it takes, as a model: the figures of docs/scaling.md.

Bytes are exact: `tests/test_distributed.py` counts what a step of every method hands to torch.distributed. Times are
estimates, by a simulation: what is computed, bytes over links, a latency per call, each begun when the step begins
it; `bench/mesh.py` compares them with steps measured here. `python -m forde_fast.scaling` prints the tables.

M members, B batch, D input dimension, K numbers that are sent of a sample, P parameters of a member.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from forde_fast.distributed.parts import cut

NUMBERS = 7  # of the log that all ranks add up at every step that repels
# rows [C] that a synchronised BatchNorm adds up in a step, and in how many calls: statistics [2] and [1], the
# backward pass [2]; of input gradients besides the backward pass of the first sweep [2] and the second-order one [3]
NORM_ROWS, NORM_CALLS = {"plain": 5, "second order": 10}, {"plain": 3, "second order": 5}
# forward passes' worth of work before particles are sent and after cotangents came back
PASSES = {"plain": (1, 2), "second order": (2, 4)}


@dataclass(frozen=True)
class Step:
    """members, batch, parameters   M, B, P
    split            what is cut into shares, as the method's space says it: "samples", "columns" or "nothing"; None:
                     nothing repels
    sent             K: D, or the rank of a lengthscale without tail, of input gradients; the classes of outputs; the
                     features of a last layer
    whole            of input gradients: whether the rule needs the distances of all samples
    directions       of features along so many directions
    shared           parameters that all members have in common
    channels, norms  of a member's synchronised BatchNorm layers together; how many they are
    itemsize         bytes of a number of a particle and of a gradient
    forward          operations of one sample's forward pass
    """

    members: int
    batch: int
    parameters: int
    sent: int = 0
    split: str | None = "samples"
    whole: bool = False
    directions: int = 0
    shared: int = 0
    channels: int = 0
    norms: int = 0
    itemsize: int = 4
    forward: float = 0.0

    @property
    def order(self) -> str:
        return "second order" if self.split == "samples" else "plain"


@dataclass(frozen=True)
class Machine:
    """peak     operations a second that a rank reaches
    link, wide  bytes a second from a rank to its neighbours in a node, and to other nodes
    latency     seconds of a collective
    node        ranks that are neighbours
    """

    peak: float
    link: float
    wide: float
    latency: float
    node: int = 8


def payloads(step: Step, rows: int, parts: int, rank: int = 0) -> dict[str, int]:
    """Bytes that rank `rank` hands over in a step that measures nothing beside: for "exchange", those meant for other
    ranks; for sums and what is gathered, the rank's own size."""
    ranks, row, column, item = rows * parts, rank // parts, rank % parts, step.itemsize
    members, own = step.members, _size(cut(step.members, rows)[row])
    samples = _size(cut(step.batch, parts)[column])
    found = dict.fromkeys(("exchange", "gradients", "norms", "sums", "gathered", "shared", "log"), 0)
    if rows > 1:
        units, each = {
            "samples": (samples, step.sent),
            "columns": (samples * step.sent, 2 if step.directions else 1),
            "nothing": (_size(cut(step.parameters, parts)[column]), 1),
            None: (0, 0),
        }[step.split]
        share = _size(cut(units, rows)[row])
        found["exchange"] = (own * (units - share) + (members - own) * share) * each * item
        found["shared"] = step.shared * item
    if parts > 1:
        found["gradients"] = own * step.parameters * item
        found["norms"] = own * step.channels * 8 * NORM_ROWS[step.order]
    if ranks > 1:
        found["log"] = 8 * (NUMBERS if step.split else 1)
        if step.whole:
            most = _size(cut(_size(cut(step.batch, parts)[0]), rows)[0])  # samples of the rank that has the most
            found["gathered"] = 8 + members**2 * most * item
        else:
            columns = members**2 + members * (min(step.directions, members) or 1)
            found["sums"] = 8 * {"samples": members, None: 0}.get(step.split, columns)
    return found


def _size(part: slice) -> int:
    return part.stop - part.start


def on_the_wire(payload: dict[str, int], rows: int, parts: int) -> dict[str, float]:
    """What a rank sends: a sum among n ranks takes 2 (n - 1) / n of its size, as a ring does it."""
    ranks = rows * parts
    around = {"gradients": parts, "norms": parts, "sums": ranks, "shared": rows, "log": ranks}
    factor = {name: 2 * (n - 1) / n for name, n in around.items()} | {"exchange": 1, "gathered": ranks - 1}
    return {name: size * factor[name] for name, size in payload.items()}


def simulate(step: Step, machine: Machine, rows: int, parts: int) -> dict[str, float]:
    """Seconds of a step on the busiest rank: those of its computation, "uneven" those by which it has more of it than
    the average rank, and those in which it does nothing but wait, by what for; "step" is all of them together.

    The rank computes and its link sends, each one thing after the other: the next member is computed while the
    particles of one are on their way, and pulled back while the gradients of one are added up.
    """
    own, samples = -(-step.members // rows), -(-step.batch // parts)
    sent, many = on_the_wire(payloads(step, rows, parts), rows, parts), rows * parts > 1
    near = machine.link if parts <= machine.node else machine.wide
    far = machine.link if rows * parts <= machine.node else machine.wide
    there, back = (passes * samples * step.forward / machine.peak for passes in PASSES[step.order])
    calls = step.norms * NORM_CALLS[step.order] * machine.latency if parts > 1 else 0.0
    norms = calls + sent["norms"] / own / near
    waits = dict.fromkeys(("exchange", "gradients", "norms", "small"), 0.0)
    now = free = 0.0

    def send(size: float, pace: float) -> float:
        nonlocal free
        free = max(now, free) + machine.latency + size / pace
        return free

    def wait(until: float, why: str) -> None:
        nonlocal now
        waits[why] += max(until - now, 0.0)
        now = max(until, now)

    exchanges = rows > 1 and step.split is not None
    for _ in range(own):
        now += there
        wait(now + norms / 2, "norms")
        if exchanges:
            send(sent["exchange"] / own / 2, far)
    wait(free, "exchange")
    small = (sent["sums"] + sent["gathered"] + sent["log"] + sent["shared"]) / far
    wait(now + small + (2 * machine.latency if many else 0), "small")
    backs = [send(sent["exchange"] / own / 2, far) if exchanges else now for _ in range(own)]
    for arrived in backs:
        wait(arrived, "exchange")
        now += back
        wait(now + norms / 2, "norms")
        if parts > 1:
            send(sent["gradients"] / own, near)
    wait(free, "gradients")
    even = (there + back) * step.members * step.batch / (rows * parts * samples)
    return {"compute": even, "uneven": own * (there + back) - even, **waits, "step": now}


def table(step: Step, machine: Machine, ranks: tuple[int, ...]) -> list[dict]:
    """For each number of ranks the fastest grid of those that divide it: its time, efficiency and what limits it."""
    alone = simulate(step, machine, 1, 1)["step"]
    rows = []
    for count in ranks:
        grids = [(count // parts, parts) for parts in range(1, min(count, step.batch) + 1) if count % parts == 0]
        grids = [(a, b) for a, b in grids if a <= step.members]
        if not grids:
            continue
        times = {grid: simulate(step, machine, *grid) for grid in grids}
        (a, b), found = min(times.items(), key=lambda item: item[1]["step"])
        losses = {name: lost for name, lost in found.items() if name not in ("compute", "step")}
        limit = max(losses, key=losses.get) if max(losses.values()) > 0 else "none"
        rows.append({"ranks": count, "rows": a, "parts": b, **found, "efficiency": alone / count / found["step"],
                     "next": limit})  # fmt: skip
    return rows


# ResNet50 on ImageNet and ResNet18 on CIFAR: operations and parameters of their papers, C summed over the layers
IMAGENET = Step(16, 4096, 25_557_032, 256, channels=26_560, norms=53, forward=8.2e9)
CIFAR = Step(10, 128, 11_173_962, 3072, channels=4_800, norms=20, forward=1.08e9)
H100 = Machine(peak=200e12, link=300e9, wide=40e9, latency=30e-6)
ETHERNET = Machine(peak=200e12, link=300e9, wide=1.2e9, latency=60e-6)


COUNTS = (8, 16, 32, 64, 128, 256, 512, 1024)
TABLES = {
    "CIFAR, M = 10, B = 128, K = D = 3072": (CIFAR, H100, (1, 2, 4, 8, 16, 32, 64)),
    "ImageNet, M = 16, B = 4096, rank 256": (IMAGENET, H100, COUNTS),
    "the same, K = D = 150528": (replace(IMAGENET, sent=150_528), H100, COUNTS),
    "the same, over 10 Gbit/s Ethernet, rank 256": (IMAGENET, ETHERNET, COUNTS),
    "over Ethernet, K = D": (replace(IMAGENET, sent=150_528), ETHERNET, COUNTS),
}


def as_text(rows: list[dict]) -> str:
    """The rows of `table` in Markdown, in milliseconds."""
    times = ("compute", "uneven", "exchange", "gradients", "norms", "small", "step")
    lines = ["| ranks | members x data | " + " | ".join(times) + " | efficiency | next limit |", "|---" * 11 + "|"]
    for row in rows:
        numbers = " | ".join(f"{1e3 * row[name]:.3g}" for name in times)
        grid = f"{row['rows']} x {row['parts']}"
        lines.append(f"| {row['ranks']} | {grid} | {numbers} | {row['efficiency']:.0%} | {row['next']} |")
    return "\n".join(lines)


if __name__ == "__main__":
    for title, given in TABLES.items():
        print(f"\n{title}\n\n{as_text(table(*given))}")
