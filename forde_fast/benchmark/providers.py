"""Who does the operation: plain PyTorch, the same compiled, the backends; and the check before any time is taken."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor

from forde_fast import reference
from forde_fast.benchmark.cases import DTYPES, Case
from forde_fast.guards import available
from forde_fast.lengthscales import PCA
from forde_fast.repulsion import available_backends, repulsion
from forde_fast.testing import budget
from forde_fast.types import Repulsion

PLAIN = ("reference", "compiled")
PROVIDERS = (*PLAIN, *(name for name in available_backends() if name != "reference"))


def unusable(name: str, case: Case) -> str:
    """Why a provider cannot do a case; empty where it can."""
    if name == "reference":
        members, batch, size = case.shape
        columns = size if case.rank in (0, size) else size + case.rank
        held = 4 * members**2 * batch * columns * max(4, DTYPES[case.dtype].itemsize)
        free = available(torch.device(case.device))
        text = f"it holds [M, M, B, D] four times, {held / 1e9:.1f} GB: over half of the {free / 1e9:.1f} GB free"
        return text if 2 * held > free else ""
    if name == "compiled":
        return ""
    backend = available_backends()[name]
    here = case.device == ("cpu" if name == "cpp" else "cuda")
    return "" if backend and here else f"it does not run on {case.device} tensors" if backend else backend.reason


def make_provider(name: str, particles: Tensor, scale, precision: str = "ieee") -> Callable[[], Repulsion]:
    """A call that returns value and gradient for these particles."""
    if name not in PLAIN:
        return lambda: repulsion(particles, scale, backend=name, precision=precision)
    wide = torch.promote_types(particles.dtype, torch.float32)
    ready = copy.copy(scale)
    if isinstance(ready, PCA):  # the basis brought to its dtype once, not in every call
        ready.eigenvectors, ready.eigenvalues = scale.eigenvectors.to(wide), scale.eigenvalues.to(wide)
    if name == "reference":
        return lambda: reference.repulsion(particles, ready)
    torch.compiler.reset()  # every case is compiled for its own sizes
    function = torch.compile(torch.func.grad_and_value(_objective, has_aux=True), dynamic=False)

    def compiled() -> Repulsion:
        gradient, (value, (h, d)) = function(particles.to(wide), ready)
        return Repulsion(value, gradient.to(particles.dtype), h[0], d)

    return compiled


def _objective(particles: Tensor, scale):
    """R and (h, d): the oracle's equations in one function, which torch.compile can differentiate."""
    s = reference.normalise(particles, 1e-24)
    d = reference.squared_distances(s, s.detach(), scale)
    h = reference.bandwidth_of(d.detach())
    return reference.value(d, h), (h, d)


def check(result: Repulsion, particles: Tensor, scale) -> list[str]:
    """What of a result is beyond its error budget (`testing.budget`): of the very tensors that are timed next.

    The oracle holds [M, M, B, D], so it works out the distances and gradients of the first and the last member at
    three samples. What is small is worked out whole from the result's own distances: bandwidth, value and the
    coefficients of the gradient.
    """
    members, batch, _ = particles.shape
    rows, samples = sorted({0, members - 1}), sorted({0, batch // 2, batch - 1})
    exact, plain = (_derived(result.distances.to(dtype)) for dtype in (torch.float64, torch.float32))
    c = exact.pop("coefficients")[:, :, samples]
    picked = particles[:, samples]
    exact |= _oracle(picked.double(), scale, c, rows)
    plain |= _oracle(picked.float(), scale, c.float(), rows)
    found = {
        "bandwidth": result.bandwidth,
        "value": result.value,
        "distances": result.distances[rows][:, :, samples],
        "gradient": result.gradient[rows][:, samples],
    }
    wrong = []
    for what, got in found.items():
        error, allowed = _relative(got, exact[what]), _relative(plain[what], exact[what])
        allowed = budget(allowed, particles.dtype, rounded=what == "gradient")
        if not error <= allowed:  # NaN is wrong too
            wrong.append(f"{what} off by {error:.1e}, allowed {allowed:.1e}")
    return wrong


def _derived(d: Tensor) -> dict[str, Tensor]:
    """What the oracle makes of distances [M, M, B]."""
    h = reference.bandwidth_of(d)
    c = reference.weights(d, h) / h * (-2 / d.shape[2])
    return {"bandwidth": h[0], "value": reference.value(d, h), "coefficients": c}


def _oracle(x: Tensor, scale, c: Tensor, rows: list[int]) -> dict[str, Tensor]:
    """Distances [rows, M, B] and gradient [rows, B, D] of some of the particles x, a few others at a time."""
    step = max(1, 2**25 // x[0].numel())
    distances, gradients = [], []
    for i in rows:
        parts, gradient = [], 0
        for j in range(0, len(x), step):
            d, state = reference.distances(x[i : i + 1], scale, others=x[j : j + step])
            gradient = gradient + reference.combine(state, c[i : i + 1, j : j + step])
            parts.append(d)
        distances.append(torch.cat(parts, 1))
        gradients.append(gradient)
    return {"distances": torch.cat(distances), "gradient": torch.cat(gradients)}


def _relative(x: Tensor, exact: Tensor) -> float:
    return float((x.double() - exact).norm() / exact.norm())
