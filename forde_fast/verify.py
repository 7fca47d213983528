"""`forde-fast verify`: every usable backend against the float64 oracle, as rows that say what was allowed."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch

from forde_fast.repulsion import FUSED_MEMBERS, available_backends
from forde_fast.testing import CASES, LENGTHSCALES, compare, make_lengthscale

SHAPES = ((1, 3, 300), (2, 5, 63), (3, 4, 7), (10, 2, 90), (10, 4, 300), (17, 2, 400))
DTYPES = (torch.float32, torch.bfloat16, torch.float64)

# How the members lie, as the table has it -> the cases of `testing` of which the worst is shown.
SPREADS = {
    "1": ("random", "dead row"),
    "0.1": ("spread 1e-1",),
    "0.01": ("spread 1e-2",),
    "0.001": ("spread 1e-3",),
    "sets": ("two clusters",),
    "pair": ("close pair 1e-2", "close pair 1e-4"),
    "twins": ("duplicate", "scaled twins", "zeros"),
}


def verify(watch: Callable = lambda items, total: items) -> list[dict]:
    """One row per backend, precision and lengthscale: errors by case, the largest of all, whether all were within
    their budget (see `testing`). Backends that cannot run here have one row that says why.

    watch  (items, total) -> the items, and shows how far it is
    """
    rows = [
        {"backend": name, "usable": False, "reason": backend.reason, "within": True}
        for name, backend in available_backends().items()
        if not backend
    ]
    usable = [name for name, backend in available_backends().items() if backend and name != "reference"]
    parts = list(itertools.product(DTYPES, LENGTHSCALES))
    for dtype, kind in watch(parts, total=len(parts)):
        rows += _rows(usable, dtype, kind)
    return sorted(rows, key=lambda row: row["backend"])


def _rows(backends: list[str], dtype: torch.dtype, kind: str) -> list[dict]:
    """The rows of all backends and precisions for a dtype: they share the oracle's results, which take the time."""
    ways = [
        (name, device, *way)
        for name in backends
        for device in [_device(name)]
        for way in _precisions(dtype, device, kind)
    ]
    rows = [_empty_row(name, dtype, label, kind) for name, _, label, _ in ways]
    for shape in SHAPES:
        scale = make_lengthscale(kind, shape[2])
        for case in CASES:
            for row, (name, device, _, options) in zip(rows, ways, strict=True):
                if name == "cuda" and shape[0] > FUSED_MEMBERS:
                    continue
                _add(row, case, shape, compare(name, case, shape, dtype, scale, device=device, **options))
    return rows


def _device(backend: str) -> str:
    return "cuda" if torch.cuda.is_available() and backend != "cpp" else "cpu"


def _precisions(dtype: torch.dtype, device: str, kind: str) -> list[tuple[str, dict]]:
    """What a dtype is called in the table, and the operation's arguments: one way each to multiply matrices."""
    name = str(dtype).removeprefix("torch.")
    if device == "cpu":
        return [(name, {})]
    others = ("tf32", "tf32x3") if dtype == torch.float32 and kind.startswith("pca") else ()
    return [(name, {"precision": "ieee"}), *((other, {"precision": other}) for other in others)]


def _empty_row(backend: str, dtype: torch.dtype, precision: str, kind: str) -> dict:
    return {
        "backend": backend,
        "usable": True,
        "dtype": str(dtype).removeprefix("torch."),
        "precision": precision,
        "lengthscale": kind,
        "value_error": 0.0,
        "gradient_error": 0.0,
        "of_budget": 0.0,
        "within": True,
        "beyond": [],
        "cases": {},
    }


def _add(row: dict, case: str, shape, found) -> None:
    """Take the errors of one case at one shape into a row: the largest of each, and those beyond their budget."""
    errors = row["cases"].setdefault(case, {"value_error": 0.0, "gradient_error": 0.0})
    for what, error in found.items():
        key = f"{what}_error"
        errors[key] = max(errors[key], error.error)
        row[key] = max(row[key], error.error)
        row["of_budget"] = max(row["of_budget"], error.error / error.budget)
        if not error.within:
            row["within"] = False
            row["beyond"].append(f"{what} of '{case}' at {shape}: {error.error:.1e}, allowed {error.budget:.1e}")


HEAD = ("precision", "lengthscale", *SPREADS, "value", "limit")


def cells(row: dict) -> tuple[str, ...]:
    """A usable backend's row under HEAD: the gradient's largest error at every spread, the value's over all."""
    spreads = (
        max((row["cases"][case]["gradient_error"] for case in cases if case in row["cases"]), default=0.0)
        for cases in SPREADS.values()
    )
    numbers = (f"{error:.0e}".replace("e-0", "e-") if error else "0" for error in (*spreads, row["value_error"]))
    return row["precision"], row["lengthscale"], *numbers, f"{100 * row['of_budget']:.0f}%" if row["within"] else "NO"
