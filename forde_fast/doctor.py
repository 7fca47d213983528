"""What a run's log says went wrong, and what to change: the known ways in which a repulsive ensemble fails."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import NamedTuple

from forde_fast.validation import expect


class Finding(NamedTuple):
    """name of the fault, what was seen of it (with its limit), what to change"""

    name: str
    seen: str
    advice: str


class Limits:
    """Where a quantity, as its median over the second half of the steps, is no longer that of a sound run.

    `tests/test_doctor.py` has a run on each side of every one of them.
    """

    grown = 10.0  # of the last cross-entropy over the first
    cosine = 0.95  # members that were initialised apart come to 0.2 to 0.8; 0.95 is an angle of 18 degrees
    alike = 0.9  # of the mean kernel: under the median rule it lies near 1/M, below 0.5 for any M
    zero = 1e-4  # of the mean kernel: under the median rule 1/M, and nobody trains 10,000 members
    jump = 0.2  # of the median distance from step to step, relative. Measured: 0.02 to 0.05 in batches of 64 and
    # 128, 0.09 to 0.14 of 16, 0.24 to 0.37 of 2
    weak = 1e-3  # of the gradients' ratio: parameters move by a thousandth of what cross-entropy moves them
    strong = 1.0  # of the same: the members are moved more by each other than by the data
    fallen = 0.9  # of the first steps' cross-entropy: late in training its gradient fades, so that a ratio
    # above `strong` is a fault only where cross-entropy did not fall below this share
    dead = 0.01  # share of the particles: each is a sample and member that nothing pushes apart
    alignment = 1e-3  # mean |cosine| of input and input gradient: 0.8 / sqrt(D) for directions of chance
    variance = (0.5, 2.0)  # over that of the lengthscale's images: batches and augmentation move it by a tenth


def examine(log: Sequence[dict]) -> list[Finding]:
    """The faults in a log, one dict per step as `log.jsonl` has them; none for a run without repulsion, where there
    is nothing to examine but that it did not diverge. Raises ValueError for an empty log."""
    expect(len(log) > 0, "log", "at least one step", "none")
    late = log[len(log) // 2 :]
    diverged = _diverged(log)
    if diverged is not None or "kernel_mean" not in log[0]:  # what followed from it, or nothing repels
        return [diverged] if diverged else []
    return [finding for check in CHECKS if (finding := check(log, late)) is not None]


def read_log(folder: str | Path) -> list[dict]:
    """The steps in a run's folder. Raises FileNotFoundError, and ValueError for a file of another kind."""
    path = Path(folder) / "log.jsonl"
    expect(path.is_file(), "run", "the folder of a run, with its log.jsonl", folder, FileNotFoundError)
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    log = []
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            if number == len(lines):  # the last line of a run that is being written may be cut off
                break
            record = None
        expect(_is_step(record, (log or [record])[0]), f"{path}, line {number}", "a step of a run", repr(line[:40]))
        log.append(record)
    return log


def _is_step(record, first) -> bool:
    """Whether it has the numbers that the checks look at, in a log with this first record."""
    wanted = {"step", "cross_entropy"}
    if isinstance(first, dict) and "kernel_mean" in first:
        wanted |= {"rows", "kernel_mean", "gradient_cosine", "bandwidth_median", "gradient_ratio", "dead_rows"}
        wanted |= {"input_alignment", "input_variance"}
    return isinstance(record, dict) and all(type(record.get(name)) in (int, float) for name in wanted)


def _middle(log: Sequence[dict], key: str) -> float:
    return median(record[key] for record in log)


def _diverged(log) -> Finding | None:
    first, last = log[0]["cross_entropy"], log[-1]["cross_entropy"]
    pushed = log[0].get("gradient_ratio", 0.0) > Limits.strong  # then the repulsion did it
    if math.isfinite(last) and (last <= Limits.grown * first or pushed):
        return None
    seen = f"cross-entropy went from {first:.3g} to {last:.3g} by step {log[-1]['step']}"
    return Finding("diverged", seen, "a smaller lr (a tenth), and inputs of mean 0 and deviation 1")


def _collapsed(log, late) -> Finding | None:
    cosine = _middle(late, "gradient_cosine")
    if cosine <= Limits.cosine:
        return None
    return Finding(
        "members collapse",
        f"mean cosine between members' gradients {cosine:.3f} (limit {Limits.cosine})",
        "members that start apart (another seed or head each); bandwidth 'median' or a smaller number, a lengthscale "
        "that weighs more directions (a smaller alpha); then a larger repulsion_weight",
    )


def _alike(log, late) -> Finding | None:
    kernel = _middle(late, "kernel_mean")
    if kernel <= Limits.alike:
        return None
    return Finding(
        "kernel values all alike",
        f"mean kernel between members {kernel:.3f} (limit {Limits.alike})",
        "bandwidth 'median', or a number near the log's bandwidth_median / log(members)",
    )


def _all_but_one_zero(log, late) -> Finding | None:
    kernel = _middle(late, "kernel_mean")
    if kernel >= Limits.zero:
        return None
    return Finding(
        "kernel values all but one zero",
        f"mean kernel between members {kernel:.1e} (limit {Limits.zero}): no member feels another",
        "bandwidth 'median', or a number near the log's bandwidth_median / log(members)",
    )


def _unstable(log, late) -> Finding | None:
    values = [record["bandwidth_median"] for record in late]
    jumps = [abs(b - a) / max(a, b) for a, b in itertools.pairwise(values) if max(a, b) > 0]
    if not jumps or median(jumps) <= Limits.jump:
        return None
    return Finding(
        "medians unstable",
        f"the median distance changes by {median(jumps):.0%} from step to step (limit {Limits.jump:.0%})",
        "a larger batch_size; or one bandwidth for the batch, Median(over='batch')",
    )


def _weak(log, late) -> Finding | None:
    ratio = _middle(late, "gradient_ratio")
    if ratio >= Limits.weak or ratio == 0:  # 0: cross-entropy has none to compare it with
        return None
    return Finding(
        "repulsion too weak",
        f"its gradient is {ratio:.1e} of cross-entropy's (limit {Limits.weak})",
        "a larger repulsion_weight (ten times), or a smaller batch_size: its strength falls as the batch grows",
    )


def _dominates(log, late) -> Finding | None:
    ratio = _middle(late, "gradient_ratio")
    first = _middle(log[: max(1, len(log) // 20)], "cross_entropy")
    share = _middle(late, "cross_entropy") / first if first else 0.0
    if ratio <= Limits.strong or share < Limits.fallen:
        return None
    return Finding(
        "repulsion dominates",
        f"its gradient is {ratio:.1f} of cross-entropy's, which stays at {share:.0%} of its start",
        "a smaller repulsion_weight (a tenth), or a larger batch_size",
    )


def _dead(log, late) -> Finding | None:
    share = sum(r["dead_rows"] for r in late) / max(1, sum(r["rows"] for r in late))
    if share <= Limits.dead:
        return None
    return Finding(
        "dead rows",
        f"{share:.1%} of the samples have no input gradient in a member (limit {Limits.dead:.0%})",
        "a smaller lr, inputs of mean 0 and deviation 1, activations that do not die (LeakyReLU, GELU)",
    )


def _normalises(log, late) -> Finding | None:
    aligned, variance = _middle(late, "input_alignment"), _middle(late, "input_variance")
    low, high = Limits.variance
    if 0 < aligned < Limits.alignment:
        seen = f"scaling an input changes nothing: cosine with the gradient {aligned:.0e} (limit {Limits.alignment})"
    elif variance and not low <= variance <= high:
        seen = f"the inputs have {variance:.3g} of the variance that the lengthscale was fitted on ({low} to {high})"
    else:
        return None
    advice = "normalise before the network, not in it, and fit the lengthscale on what the network then receives"
    return Finding("the network normalises its input inside", seen, advice)


CHECKS: tuple[Callable, ...] = (
    _collapsed, _alike, _all_but_one_zero, _unstable, _weak, _dominates, _dead, _normalises,
)  # fmt: skip
