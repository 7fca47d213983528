"""Tables in the paper's form, with intervals over seeds, and which of the paper's orderings they show."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import NamedTuple

from forde_fast import evaluation
from forde_fast.data import CORRUPTIONS
from forde_fast.validation import expect

METRICS = {"nll": ("NLL", 1.0, 3), "accuracy": ("A", 100.0, 1), "ece": ("ECE", 1.0, 3)}  # title, factor, digits
GROUPS = {"clean": "", "corrupted": "c", "corrupted_all": "a", "corrupted_grey": "g"}
LEGEND = {
    "clean": "no prefix: clean test images",
    "corrupted": "c: mean over the 15 standard corruptions at CIFAR-10-C's severities",
    "corrupted_all": "a: over all 19 corruptions",
    "corrupted_grey": "g: mean over those that are harder in the preset for grey images, at its severities",
}
TUNING = (
    "Chosen on a validation split by the least loss, the mean of the negative log-likelihoods on clean images and "
    "under the 4 extra corruptions, which the columns c and g leave out. (lowest) and (highest) are at an end of the "
    "candidates; at w = 0 every method is the deep ensemble. The rows -published were not tuned."
)
PLUS_MINUS = " ± "
ONE = "one seed, which says nothing of how runs scatter"


class Claim(NamedTuple):
    """An ordering in the paper's tables: `metric` of `one` minus that of `other` has this sign (0: no difference)."""

    one: str
    other: str
    group: str
    metric: str
    sign: int


CLAIMS = (
    Claim("forde-pca", "de", "corrupted", "accuracy", 1),
    Claim("forde-pca", "de", "corrupted", "nll", -1),
    Claim("forde-pca", "de", "clean", "accuracy", -1),
    Claim("forde-identity", "de", "clean", "accuracy", 1),
    Claim("forde-identity", "de", "corrupted", "accuracy", 0),
    Claim("forde-tuned", "de", "corrupted", "accuracy", 1),
    Claim("forde-tuned", "forde-identity", "corrupted", "accuracy", 1),
    Claim("forde-pca", "forde-tuned", "corrupted", "accuracy", 1),
    Claim("function-rde", "de", "clean", "accuracy", -1),
    Claim("function-rde", "de", "corrupted", "accuracy", -1),
    Claim("weight-rde", "de", "clean", "nll", 0),
    Claim("feature-rde", "de", "corrupted", "accuracy", 1),
    Claim("feature-rde", "de", "clean", "nll", 1),
    Claim("lit", "de", "clean", "nll", 0),
)


class Interval(NamedTuple):
    """A mean and half the width of its 95 % interval (Student's t), infinite for a single value."""

    mean: float
    half: float

    @property
    def sign(self) -> int:
        """Of the mean, or 0 where the interval holds 0."""
        if not abs(self.mean) > self.half:
            return 0
        return 1 if self.mean > 0 else -1


def interval(values: Sequence[float]) -> Interval:
    """Of the values' mean."""
    found = evaluation.interval(values)
    return Interval(found["mean"], (found["high"] - found["low"]) / 2)


def scores(rows: dict, row: str, group: str, metric: str) -> list[float]:
    """One per seed."""
    return [metrics[group][metric] for metrics in rows[row]["metrics"]]


def difference(rows: dict, one: str, other: str, group: str, metric: str) -> Interval:
    """`one` minus `other`, seed by seed."""
    pairs = zip(scores(rows, one, group, metric), scores(rows, other, group, metric), strict=True)
    return interval([a - b for a, b in pairs])


def groups_of(rows: dict) -> list[str]:
    return [group for group in GROUPS if all(group in metrics for row in rows.values() for metrics in row["metrics"])]


def signed(number: float, digits: int) -> str:
    """With its sign; what rounds to 0 has none."""
    text = f"{number:+.{digits}f}"
    return text if float(text) else text[1:]


def as_markdown(rows: dict, title: str) -> str:
    """The table, what was chosen, the differences to the tuned deep ensemble, and the paper's orderings."""
    expect("de" in rows, "rows", "one of a deep ensemble", list(rows))
    seeds = len(rows["de"]["metrics"])
    parts = [f"# {title}", _scores(rows), _settings(rows), _differences(rows, seeds), _claims(rows)]
    return "\n\n".join(parts) + "\n"


def plain(rows: dict, title: str) -> str:
    """The table and the settings of rows that cannot be compared seed by seed."""
    return "\n\n".join([f"# {title}", _scores(rows), _settings(rows)])


def markdown_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


def _scores(rows: dict) -> str:
    groups = groups_of(rows)
    head = ["method", "NLL", "A", "ECE"]
    head += [" / ".join(GROUPS[g] + METRICS[m][0] for m in ("accuracy", "nll", "ece")) for g in groups[1:]]
    lines = []
    for row in rows:
        cells = [_mean(rows, row, "clean", metric) for metric in METRICS]
        cells += [" / ".join(_mean(rows, row, g, m) for m in ("accuracy", "nll", "ece")) for g in groups[1:]]
        lines.append([row, *cells])
    legend = "; ".join(LEGEND[group] for group in groups) + _scored(rows, groups)
    text = f"{_origin(rows)} Accuracy in %, NLL in nats, {legend}."
    return f"{text}\n\n{markdown_table(head, lines)}"


def _scored(rows: dict, groups: Sequence[str]) -> str:
    """What columns are that are not means over all corruptions, as those of runs with `corruptions` of their own."""
    metrics = [own for row in rows.values() for own in row["metrics"] if "corrupted" in groups]
    found = {frozenset(own["corrupted"].get("by_corruption", CORRUPTIONS)) for own in metrics}
    if len(found) > 1:
        return "; but not all runs were scored under the same corruptions"
    names = [name for name in CORRUPTIONS if found and name in next(iter(found))]
    return f"; but of these only {', '.join(names)} were scored" if 0 < len(names) < len(CORRUPTIONS) else ""


def _origin(rows: dict) -> str:
    """Of how many seeds each row's numbers are."""
    counts = sorted({len(own["metrics"]) for own in rows.values()})
    if counts == [1]:
        return f"From {ONE}."
    seeds = " to ".join(str(count) for count in dict.fromkeys((counts[0], counts[-1])))
    return f"Means{PLUS_MINUS}standard deviations over {seeds} seeds."


def _mean(rows: dict, row: str, group: str, metric: str) -> str:
    _, factor, digits = METRICS[metric]
    values = [factor * value for value in scores(rows, row, group, metric)]
    text = f"{statistics.fmean(values):.{digits}f}"
    return text + (f"{PLUS_MINUS}{statistics.stdev(values):.{digits}f}" if len(values) > 1 else "")


def _settings(rows: dict) -> str:
    tuned = any("tuning" in own for own in rows.values())
    head = ["row", "weight decay", "w, in units of the published strength", "w N/B", "alpha", *["loss"] * tuned]
    lines = []
    for row, own in rows.items():
        method, tuning = own["method"], own.get("tuning", {})
        ends = tuning.get("ends", {})
        cells = {name: f"{value:g}" + (f" ({ends[name]})" if name in ends else "")
                 for name, value in own["setting"].items()}  # fmt: skip
        weight = "" if method == "de" else cells["repulsion_weight"]
        alpha = cells["alpha"] if method == "forde-tuned" else ""
        strength = own["metrics"][0].get("strength") if method.startswith("forde") else None  # of R with its 1 / B
        strength = "" if strength is None else f"{strength:.0f}"
        loss = [f"{tuning['loss']:.4f}" if tuning else ""] * tuned
        lines.append([row, cells["weight_decay"], weight, strength, alpha, *loss])
    text = "FoRDE's w N/B, its repulsion over that of the posterior, is 391 on CIFAR at w = 1."
    if tuned:
        text = f"{TUNING} {text}"
    return f"## Settings\n\n{text}\n\n{markdown_table(head, lines)}"


def _differences(rows: dict, seeds: int) -> str:
    groups = [group for group in groups_of(rows) if group != "corrupted_all"]
    columns = [(group, metric) for group in groups for metric in ("accuracy", "nll", "ece")]
    head = ["method", *(GROUPS[group] + METRICS[metric][0] for group, metric in columns)]
    lines = []
    for row in rows:
        if row != "de":
            lines.append([row, *(_shown(difference(rows, row, "de", *column), column[1]) for column in columns)])
    text = (
        f"mean{PLUS_MINUS}95 % interval of {seeds} differences, bold where it does not hold 0 (no correction for the "
        f"number of comparisons)"
    )
    text = f"Paired by seed: the same first members and batches; {text if seeds > 1 else f'from {ONE}'}."
    return f"## Differences to the deep ensemble\n\n{text}\n\n{markdown_table(head, lines)}"


def _shown(found: Interval, metric: str) -> str:
    _, factor, digits = METRICS[metric]
    text = signed(factor * found.mean, digits + 1)
    if math.isfinite(found.half):
        text += f"{PLUS_MINUS}{factor * found.half:.{digits + 1}f}"
    return f"**{text}**" if found.sign else text


def verdict(found: Interval, sign: int) -> str:
    if math.isinf(found.half):
        return "one seed says nothing"
    if sign == 0:
        return "no difference here either" if found.sign == 0 else "a difference here"
    return {sign: "shown", 0: "not shown: the interval holds 0", -sign: "the contrary"}[found.sign]


def _claims(rows: dict) -> str:
    lines = []
    for claim in CLAIMS:
        if claim.one in rows and claim.other in rows and claim.group in groups_of(rows):
            found = difference(rows, *claim[:4])
            title = GROUPS[claim.group] + METRICS[claim.metric][0]
            relation = {1: "above", -1: "below", 0: "as"}[claim.sign]
            text = f"{title} of {claim.one} {relation} {claim.other}"
            lines.append([text, _shown(found, claim.metric), verdict(found, claim.sign)])
    head = ["the paper's tables have", "difference here", "verdict"]
    return f"## The paper's orderings\n\n{markdown_table(head, lines)}"
