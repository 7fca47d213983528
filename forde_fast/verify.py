"""`forde-fast verify`: every usable backend against the float64 oracle, as rows that say what was allowed."""

from __future__ import annotations

import torch

from forde_fast.lengthscales import Identity
from forde_fast.repulsion import FUSED_MEMBERS, available_backends
from forde_fast.testing import CASES, compare, make_pca

SHAPES = ((1, 3, 300), (2, 5, 64), (3, 4, 7), (10, 8, 300), (17, 2, 400))
DTYPES = (torch.float32, torch.bfloat16, torch.float64)


def verify() -> list[dict]:
    """One row per backend, dtype and lengthscale: the largest errors over cases and shapes, and whether all were
    within their budget (see `testing`). Backends that cannot run here have one row that says why."""
    rows = []
    for name, backend in available_backends().items():
        if not backend:
            rows.append({"backend": name, "usable": False, "reason": backend.reason, "within": True})
        elif name != "reference":
            device = "cuda" if name in ("triton", "cuda") and torch.cuda.is_available() else "cpu"
            for dtype in DTYPES:
                rows += [_row(name, dtype, kind, device) for kind in ("identity", "pca", "pca low rank")]
    return rows


def _row(backend: str, dtype: torch.dtype, kind: str, device: str) -> dict:
    largest = {"value": 0.0, "gradient": 0.0}
    beyond = []
    for shape in SHAPES:
        if backend == "cuda" and shape[0] > FUSED_MEMBERS:
            continue
        size = shape[2]
        scale = {"identity": Identity(), "pca": make_pca(size), "pca low rank": make_pca(size, 1 + size // 4, 0.01)}
        for case in CASES:
            for what, errors in compare(backend, case, shape, dtype, scale[kind], device=device).items():
                largest[what] = max(largest[what], errors.error)
                if not errors.within:
                    text = f"{what} of '{case}' at {shape}: {errors.error:.1e}, allowed {errors.budget:.1e}"
                    beyond.append(text)
    return {
        "backend": backend,
        "usable": True,
        "dtype": str(dtype).removeprefix("torch."),
        "lengthscale": kind,
        "value_error": largest["value"],
        "gradient_error": largest["gradient"],
        "within": not beyond,
        "beyond": beyond,
    }
