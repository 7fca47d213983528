"""`forde-fast bench`: the operation beside its floor (`floors`) and beside plain PyTorch, verified first, then timed.

cases      what is timed: shapes, lengthscales, and what is asked of the fast backends
providers  who does it: plain PyTorch, the same compiled, the backends; and the check before any time is taken
floors     the time that no implementation can beat by much
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from forde_fast import heap, validation
from forde_fast.benchmark.cases import (
    DEFAULT_SHAPES,
    DTYPES,
    GROUPS,
    SHAPES,
    SPEEDUPS,
    TARGETS,
    Case,
    make_cases,
    make_lengthscale,
)
from forde_fast.benchmark.floors import count, floor_of, peaks
from forde_fast.benchmark.providers import PLAIN, PROVIDERS, check, make_provider, unusable
from forde_fast.guards import available
from forde_fast.precision import products_in
from forde_fast.timing import append, captured, interleaved, quantiles, ratio

__all__ = ["DEFAULT_SHAPES", "DTYPES", "GROUPS", "PROVIDERS", "SHAPES", "as_text", "bench", "default_device", "keep"]

BUDGET = 3.0  # seconds of timing for each provider of a case, after the rounds that all take part in


def default_device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def bench(
    shapes: str = DEFAULT_SHAPES,
    lengthscales: str | None = None,
    providers: str = ",".join(PROVIDERS),
    rounds: int = 25,
    device: str | None = None,
    dtype: str = "float32",
    precision: str | None = None,
    cache: str | None = None,
) -> Iterator[list[dict]]:
    """Measure one case after the other; ValueError for a selection that is none, before any work.

    shapes        "cifar,50x128x3072": names of SHAPES or GROUPS, or MxBxD
    lengthscales  "identity,pca,rank256,cosine"; by default the first three, where they suit D
    providers     of PROVIDERS
    rounds        at most so many; a slow provider has fewer, at least 5
    precision     of products of float32 matrices: "ieee", or "tf32" (the default on a GPU)
    cache         on a GPU only with "cold" or only with "warm" level-2 cache

    Yields the rows of a case, one per provider (and cache state): `ms` with its quantiles and what it is compared
    with, or `left_out` with the reason, or `wrong` with what was beyond its error budget, and then no time.
    """
    device = device or default_device()
    precision = precision or ("tf32" if device == "cuda" else "ieee")
    names = [validation.one_of(name, "providers", PROVIDERS) for name in validation.names_in(providers)]
    validation.whole(rounds, "rounds")
    caches = (cache,) if cache else ("cold", "warm")
    cases = make_cases(shapes, lengthscales, device, dtype, precision)
    return (_measure(case, names, rounds, caches if device == "cuda" else ("",)) for case in cases)


def _measure(case: Case, providers: list[str], rounds: int, caches: tuple[str, ...]) -> list[dict]:
    basis_bytes = 12 * case.shape[2] * case.rank  # in float64 and in float32
    if 2 * basis_bytes > available(torch.device(case.device)):
        return [_row(case, "all", left_out=f"the basis would take {basis_bytes / 1e9:.0f} GB")]
    torch.manual_seed(0)
    particles = torch.randn(case.shape, device=case.device, dtype=DTYPES[case.dtype])
    scale = make_lengthscale(case)
    rows, calls = [], {}
    # large memory is given back at once: else whether a result's must be fetched anew depends on where the heap ends
    with products_in(case.precision), heap.large_given_back():
        for name in providers:
            missing = _prove(name, case, particles, scale, calls)
            rows += [_row(case, name, **missing)] if missing else []
        rows += _time(case, calls, particles, scale, rounds, caches)
    return sorted(rows, key=lambda row: providers.index(row["provider"]))


def _prove(name: str, case: Case, particles: Tensor, scale, calls: dict) -> dict:
    """Add the provider to `calls`, or return why it must not be timed."""
    if reason := unusable(name, case):
        return {"left_out": reason}
    try:
        call = make_provider(name, particles, scale, case.precision)
        wrong = check(call(), particles, scale)
    except Exception as error:
        reason = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
        refused = "RuntimeError: backend: " in reason  # the operation's words for what a backend does not do
        if name in PLAIN or refused or isinstance(error, torch.OutOfMemoryError):
            return {"left_out": reason}
        wrong = [reason]  # whatever else stops our own backend is a fault of it
    if wrong:
        return {"wrong": wrong}
    calls[name] = call
    return {}


def _time(case: Case, calls: dict, particles: Tensor, scale, rounds: int, caches: tuple[str, ...]) -> list[dict]:
    floor_text, floor = floor_of(case, particles, scale)
    launch = dict.fromkeys(calls, "eager")
    if case.device == "cuda":
        for name in calls:
            with contextlib.suppress(RuntimeError):
                calls[name], launch[name] = captured(calls[name]), "graph"
    elif calls:
        calls = {"floor": floor, **calls}
    rows = []
    for cache in caches if calls else ():
        times = interleaved(calls, rounds, case.device, cache or None, BUDGET)
        floors = times.pop("floor", [floor] * rounds)
        for name, own in times.items():
            low, middle, high = (round(1e3 * t, 5) for t in quantiles(own))
            row = _row(
                case, name, cache=cache, launch=launch[name], rounds=sum(t == t for t in own),
                ms=middle, ms_20=low, ms_80=high, floor=floor_text,
                floor_ms=round(1e3 * quantiles(floors)[1], 5), ratio=round(ratio(own, floors), 3),
                **{f"{plain}_over_this": round(ratio(times[plain], own), 2) for plain in PLAIN if plain in times},
            )  # fmt: skip
            rows.append(row | _target(case, row))
    return rows


def _row(case: Case, provider: str, **measured) -> dict:
    moved, products, pairs = count(case)
    sizes = dict(zip("MBD", case.shape, strict=True))
    chosen = {name: getattr(case, name) for name in ("lengthscale", "device", "dtype", "precision")}
    return {"provider": provider, **sizes, **chosen, "bytes": moved, "flop": products + pairs, **measured}


def _target(case: Case, row: dict) -> dict:
    """What is asked of a fast backend for this case, and whether it was reached."""
    if row["provider"] in PLAIN or row["cache"] == "warm" or case.dtype != "float32":
        return {}
    asked = {}
    if (case.device, case.lengthscale, case.shape) in TARGETS:
        what, most = TARGETS[case.device, case.lengthscale, case.shape]
        asked[f"{most:g} x floor" if what == "ratio" else f"{most:g} ms"] = row[what] <= most
    if case.device == "cuda" and case.shape == SHAPES["cifar"]:
        for plain, least in SPEEDUPS.get(case.lengthscale, {}).items():
            if f"{plain}_over_this" in row:
                asked[f"{plain} / {least}"] = row[f"{plain}_over_this"] >= least
    missed = [text for text, reached in asked.items() if not reached]
    return {"target": ", ".join(asked), "met": f"no: {', '.join(missed)}" if missed else "yes"} if asked else {}


def keep(rows: list[dict], folder: Path | None) -> None:
    """Append the rows that have a time to FOLDER/repulsion.csv."""
    timed = [row for row in rows if "ms" in row]
    if folder is not None and timed:
        rates = peaks() if timed[0]["device"] == "cuda" else {}
        rates = {f"{name}_per_s": f"{rate:.4g}" for name, rate in rates.items()}
        append("repulsion", [row | rates for row in timed], folder)


def as_text(rows: list[dict]) -> str:
    """The rows of a case as lines under a heading."""
    first, timed = rows[0], [row for row in rows if "ms" in row]
    head = "{lengthscale}, M x B x D = {M} x {B} x {D}, {dtype}".format(**first)
    head += ", products in tf32" if first["precision"] == "tf32" else ""
    head += f": {first['bytes'] / 1e6:.4g} MB, {first['flop'] / 1e9:.3g} GFLOP"
    if timed:
        head += ", floor {floor_ms:.4g} ms ({floor})".format(**timed[0])
    return "\n".join([head, *map(_as_line, rows)])


def _as_line(row: dict) -> str:
    text = "  {provider:<10}".format(**row)
    if "left_out" in row:
        return text + "left out: " + row["left_out"]
    if "wrong" in row:
        return text + "WRONG, not timed: " + "; ".join(row["wrong"])
    text += "{ms:10.4g} ms  ({ms_20:.4g} to {ms_80:.4g})  {ratio:7.2f} x floor".format(**row)
    text += f"  {row['cache']}, {row['launch']}" if row["cache"] else ""
    for plain in PLAIN if row["provider"] not in PLAIN else ():
        text += f"  {plain} / this {row[f'{plain}_over_this']:.3g}" if f"{plain}_over_this" in row else ""
    text += "  asked: {target}; reached: {met}".format(**row) if "target" in row else ""
    return text
