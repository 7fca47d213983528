"""What a step on a mesh sends and how long it takes, as a model: the figures of docs/scaling.md.

Bytes are exact: `tests/test_distributed.py` counts what a step hands to torch.distributed. Times are estimates: what
is computed, bytes over links, a latency per call, less what overlaps. `python -m forde_fast.scaling` prints tables.

M members, B batch, D input dimension, K numbers that are sent of a particle (D, or the rank of a lengthscale without
tail), P parameters of a member.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from forde_fast.distributed.parts import cut

NUMBERS = 7  # of the log that all ranks add up at every step
# rows [C] that a synchronised BatchNorm adds up in a step, and in how many calls: statistics [2] and [1], the
# backward passes of both sweeps [2] and [2], the second-order pass [3]
NORM_ROWS, NORM_CALLS = 10, 5


@dataclass(frozen=True)
class Step:
    """members, batch, parameters   M, B, P
    sent             K
    channels, norms  of a member's synchronised BatchNorm layers together; how many they are
    itemsize         bytes of a number of a particle and of a gradient
    forward          operations of one sample's forward pass
    """

    members: int
    batch: int
    sent: int
    parameters: int
    channels: int = 0
    norms: int = 0
    itemsize: int = 4
    forward: float = 0.0


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
    ranks; for sums, the sums' own size."""
    ranks, row, column = rows * parts, rank // parts, rank % parts
    own = _size(cut(step.members, rows)[row])
    samples = _size(cut(step.batch, parts)[column])
    share = _size(cut(samples, rows)[row])
    particle = step.sent * step.itemsize
    found = dict.fromkeys(("exchange", "gradients", "norms", "logarithm", "log"), 0)
    if rows > 1:
        found["exchange"] = (own * (samples - share) + (step.members - own) * share) * particle
    if parts > 1:
        found["gradients"] = own * step.parameters * step.itemsize
        found["norms"] = own * step.channels * 8 * NORM_ROWS
    if ranks > 1:
        found["logarithm"], found["log"] = 8 * step.members, 8 * NUMBERS
    return found


def _size(part: slice) -> int:
    return part.stop - part.start


def on_the_wire(payload: dict[str, int], rows: int, parts: int) -> dict[str, float]:
    """What a rank sends: a sum among n ranks takes 2 (n - 1) / n of its size, as a ring does it."""
    groups = {"exchange": None, "gradients": parts, "norms": parts, "logarithm": rows * parts, "log": rows * parts}
    return {name: payload[name] if n is None else payload[name] * 2 * (n - 1) / n for name, n in groups.items()}


def seconds(step: Step, machine: Machine, rows: int, parts: int) -> dict[str, float]:
    """Of a step on the busiest rank, by part; "step" is the whole with what overlaps taken off.

    Per sample and member a step takes 6 forward passes (docs: forward, input gradient, and four for the second-order
    sweep). Exchanges of all members but the last one are hidden behind the passes of the next, sums of gradients of
    all but the last behind its second-order sweep.
    """
    own, samples = -(-step.members // rows), -(-step.batch // parts)
    sent = on_the_wire(payloads(step, rows, parts), rows, parts)
    near = machine.link if parts <= machine.node else machine.wide
    far = machine.link if rows * parts <= machine.node else machine.wide
    compute = 6 * own * samples * step.forward / machine.peak
    exchange = sent["exchange"] / far + (2 * own * machine.latency if rows > 1 else 0)
    gradients = sent["gradients"] / near + (own * machine.latency if parts > 1 else 0)
    norms = sent["norms"] / near + (own * step.norms * NORM_CALLS * machine.latency if parts > 1 else 0)
    small = (2 * machine.latency if rows * parts > 1 else 0) + (sent["logarithm"] + sent["log"]) / far
    hidden = (own - 1) / own
    shown = exchange - min(exchange * hidden, compute) + gradients - min(gradients * hidden, compute) + norms + small
    return {
        "compute": compute,
        "exchange": exchange,
        "gradients": gradients,
        "norms": norms,
        "small": small,
        "step": compute + shown,
    }


def table(step: Step, machine: Machine, ranks: tuple[int, ...]) -> list[dict]:
    """For each number of ranks the fastest grid of those that divide it: its time, efficiency and what limits it."""
    alone = seconds(step, machine, 1, 1)["step"]
    rows = []
    for count in ranks:
        grids = [(count // parts, parts) for parts in range(1, min(count, step.batch) + 1) if count % parts == 0]
        grids = [(a, b) for a, b in grids if a <= step.members]
        if not grids:
            continue
        a, b = min(grids, key=lambda grid: seconds(step, machine, *grid)["step"])
        found = seconds(step, machine, a, b)
        parts = {name: value for name, value in found.items() if name != "step"}
        limit = max((name for name in parts if name != "compute"), key=parts.get)
        rows.append({"ranks": count, "rows": a, "parts": b, **found, "efficiency": alone / count / found["step"],
                     "next": limit})  # fmt: skip
    return rows


# ResNet50 on ImageNet and ResNet18 on CIFAR: operations and parameters of their papers, C summed over the layers
IMAGENET = Step(16, 4096, 256, 25_557_032, 26_560, 53, forward=8.2e9)
CIFAR = Step(10, 128, 3072, 11_173_962, 4_800, 20, forward=1.08e9)
H100 = Machine(peak=200e12, link=300e9, wide=40e9, latency=30e-6)
ETHERNET = Machine(peak=200e12, link=300e9, wide=1.2e9, latency=60e-6)


def as_text(rows: list[dict]) -> str:
    """The rows of `table` in Markdown, in milliseconds."""
    times = ("compute", "exchange", "gradients", "norms", "small", "step")
    lines = ["| ranks | members x data | " + " | ".join(times) + " | efficiency | next limit |", "|---" * 10 + "|"]
    for row in rows:
        numbers = " | ".join(f"{1e3 * row[name]:.3g}" for name in times)
        grid = f"{row['rows']} x {row['parts']}"
        lines.append(f"| {row['ranks']} | {grid} | {numbers} | {row['efficiency']:.0%} | {row['next']} |")
    return "\n".join(lines)


if __name__ == "__main__":
    counts = (8, 16, 32, 64, 128, 256, 512, 1024)
    full = replace(IMAGENET, sent=150_528)
    for title, given in (
        ("CIFAR, M = 10, B = 128, K = D = 3072", (CIFAR, H100, (1, 2, 4, 8, 16, 32, 64))),
        ("ImageNet, M = 16, B = 4096, rank 256", (IMAGENET, H100, counts)),
        ("the same, K = D = 150528", (full, H100, counts)),
        ("the same, over 10 Gbit/s Ethernet, rank 256", (IMAGENET, ETHERNET, counts)),
        ("over Ethernet, K = D", (full, ETHERNET, counts)),
    ):
        print(f"\n{title}\n\n{as_text(table(*given))}")
