"""The operation: repulsion between particles, its value and its gradient. Validates, chooses a backend, calls it."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from forde_fast import operators, validation
from forde_fast.lengthscales import PCA, Identity
from forde_fast.precision import PRECISIONS, matmul, outside_autocast, outside_inference
from forde_fast.rule import Median, Rule, check_bandwidth, kernel_rule
from forde_fast.types import Backend, Repulsion
from forde_fast.validation import expect, refuse

BACKENDS = tuple(operators.UNUSABLE)

# Up to so many columns the work is done in float64. It costs next to nothing there, and it is there that single
# samples meet the worst of the product's rounding: differences that lie across the few heaviest directions.
EXACT_COLUMNS = 256

DEFAULT = Median()

FUSED_MEMBERS = 16  # the most that the CUDA C++ kernel takes
LOW_RANK_MEMBERS, LOW_RANK = 10, 256  # of csrc/cuda/low_rank.h: M, K


class ByProduct(NamedTuple):
    """What `combine` needs from `distances`; N rows: the particles, then the others where these are given."""

    particles: Tensor  # [Mi, G, D]
    others: Tensor | None  # [Mj, G, D]
    product: Tensor | None  # [N - 1, G, D], orthonormal contrasts of the normalised rows times C
    norm: Tensor  # [N, G]
    alignment: Tensor  # [Mi, Mj, G], (s_i - s_j)^T C s_i
    normalize: bool
    dtype: torch.dtype  # of the gradient
    operations: object

    def combine(self, c: Tensor, projection: Tensor | None) -> Tensor:
        particles, others, product, norm, alignment, normalize, _, operations = self
        if not normalize:
            projection = torch.zeros_like(c[:, 0])
        elif projection is None:
            projection = (c * alignment).sum(1)
        return operations.combine(particles, others, product, norm, c, projection)


class ByFactors(NamedTuple):
    """The same for C = F F^T + tail I: the K columns x = S F, up to a vector that all rows of a sample share."""

    particles: Tensor  # [Mi, G, D]
    others: Tensor | None  # [Mj, G, D]
    x: Tensor  # [Mi, G, K]
    x_others: Tensor | None  # [Mj, G, K]
    norm: Tensor  # [N, G], ones
    factor: Tensor  # [D, K]
    tail: float
    normalize: bool
    eps: float
    dtype: torch.dtype  # of the gradient
    precision: str
    operations: object

    alignment = None  # projecting is left to the end

    def combine(self, c: Tensor, projection: Tensor | None) -> Tensor:
        operations = self.operations
        mixed = operations.combine(self.x, self.x_others, None, self.norm, c, torch.zeros_like(c[:, 0]))
        mixed = matmul(mixed, self.factor.T, self.precision)
        c = c * self.tail if self.tail else None
        return operations.project(self.particles, mixed, self.others, c, self.normalize, self.eps)


def available_backends() -> dict[str, Backend]:
    """Name -> `Backend`, true where it is usable here; as text, why it is not."""
    return {name: Backend(name, not reason, reason) for name, reason in operators.UNUSABLE.items()}


@outside_autocast
def repulsion(
    particles: Tensor,
    lengthscale=None,
    *,
    others: Tensor | None = None,
    normalize: bool = True,
    eps: float = 1e-24,
    bandwidth: str | Median | float | Tensor = "median",
    backend: str = "auto",
    precision: str = "tf32",
) -> Repulsion:
    """Value and gradient of the kernel repulsion R between particles.

        s = particles / sqrt(|particles|^2 + eps)                   (as they are if not `normalize`)
        d[i, j, g] = (s[i, g] - s[j, g])^T C (s[i, g] - s[j, g])    j over `others`, by default the particles
        R = (1/G) sum_i (log sum_jg exp(-d[i, j, g] / h[j, g]) - log G)

    particles    [M, G, D], float32, float64 or bfloat16, any device and strides
    lengthscale  C: Identity, PCA or any object with `coordinates`, `product`, `dimension`; None: the identity
    others       [N, G, D], constants
    bandwidth    h: "median" (see `Median`), another `Median`, or a number or tensor ([], [G] or [N, G])
    backend      "reference", "cpp", "triton", "cuda" (up to 16 particles, without others, at the default bandwidth),
                 or "auto", which alone chooses
    precision    of PCA's float32 matrix products on CUDA: "tf32" (factors rounded to 11 bits, sums in float32),
                 "tf32x3" or "ieee"; they are of differences, so that tf32 costs 3 digits of the result wherever the
                 particles are

    Returns `Repulsion`: value and bandwidth in float32 (float64 for float64), the gradient in the particles'
    dtype. The value is differentiable once with respect to the particles. Sums run in float32 or better; where
    D <= 256 everything is computed in float64.

    Raises TypeError or ValueError for bad arguments, ValueError for NaN or infinity in CPU tensors (CUDA tensors
    are not inspected: that would wait for the device; nor are CPU tensors under torch.compile) and RuntimeError,
    with the reason, for a backend that cannot run here. Source: Trinh et al., ICLR 2024, equations 16 and 17 and
    the published code.
    """
    name, implementation = _choose(backend, particles, others, lengthscale, normalize, eps, precision)
    check_bandwidth(bandwidth, particles if others is None else others)
    if others is not None and isinstance(bandwidth, Rule):
        refuse("others", "none for this rule, in which particles repel each other", list(others.shape))
    half = None
    # for "auto" too: low ranks take half the time that they take by Triton (bench/gpu.md)
    if name == "cuda" or (backend == "auto" and name == "triton" and not operators.UNUSABLE["cuda"]):
        fits = others is None and _is_default(bandwidth)
        half = _half_factor(particles, lengthscale, normalize, precision) if fits else None
        name = "cuda" if half else name
    if name != "cpp" and particles.is_cpu:
        _check_norms(name, particles, others, normalize)
    if name == "reference":
        result = outside_inference(implementation.repulsion)(
            particles, lengthscale, others, normalize, eps, bandwidth
        )
        _check_finite(particles, others, result.distances.amax())
    elif name == "cuda" or (name == "cpp" and others is None and _is_default(bandwidth)):
        if name == "cuda":
            _check_fused(particles, bool(half) or _is_identity(lengthscale), others, bandwidth)
        result = _fused(name, implementation, particles, lengthscale, normalize, eps, precision, half)
        _check_finite(particles, others, result.value)
    elif name == "triton" and _fits_at_once(particles, lengthscale, others, normalize, bandwidth):
        result = _at_once(implementation, particles, lengthscale, normalize, eps, precision)
        _check_finite(particles, others, result.value)
    else:
        d, state = _distances(implementation, particles, others, lengthscale, normalize, eps, precision)
        projection = None
        # the fused rule counts on the self-distances: without their exp(0) all of a row may underflow
        if others is None and _is_default(bandwidth):
            value, c, h, projection = implementation.median_rule(d, state.alignment, DEFAULT.log_count(d.shape[1]))
            _check_finite(particles, others, value)
        else:
            _check_finite(particles, others, d.sum())
            value, c, h = kernel_rule(d, bandwidth)
        result = _narrowed((value, _combine(state, c, projection), h, d), particles.dtype)
    validation.no_tangent(particles, "particles")
    if torch.is_grad_enabled() and particles.requires_grad:
        value = torch.ops.forde_fast.attach_gradient(particles, result.value, result.gradient)
        result = result._replace(value=value)
    return result


def check_backend(backend: str) -> None:
    """ValueError for a name that is none (the message lists them), RuntimeError for one that cannot run here."""
    validation.one_of(backend, "backend", ("auto", *BACKENDS))
    if reason := operators.UNUSABLE.get(backend):
        refuse("backend", f"one that can run here, not {backend!r}", reason, RuntimeError)


@outside_autocast
def distances(
    particles, lengthscale=None, *, others=None, normalize=True, eps=1e-24, backend="auto", precision="tf32"
):
    """The first stage of `repulsion`, with its arguments: d [M, N, G], and the state that `combine` takes."""
    name, implementation = _choose(backend, particles, others, lengthscale, normalize, eps, precision)
    if name != "cpp" and particles.is_cpu:
        _check_norms(name, particles, others, normalize)
    if name == "reference":
        d, state = outside_inference(implementation.distances)(particles, lengthscale, others, normalize, eps)
        _check_finite(particles, others, d.amax())
        return d, state
    expect(name != "cuda", "backend", "one with two stages", "'cuda', which has one", RuntimeError)
    d, state = _distances(implementation, particles, others, lengthscale, normalize, eps, precision)
    _check_finite(particles, others, d.sum())
    return d.to(operators.accumulation_dtype(particles.dtype)), state


@outside_autocast
def combine(state, c: Tensor) -> Tensor:
    """The second stage: sum_j c[i, j] C (s_i - s_j), taken back through the normalisation.

    c [M, N, G] -> [M, G, D] in the particles' dtype.
    """
    if isinstance(state, (ByProduct, ByFactors)):
        return _combine(state, c)
    from forde_fast import reference

    return outside_inference(reference.combine)(state, c)


@torch.no_grad()
def _distances(operations, particles, others, lengthscale, normalize, eps, precision):
    dtype = particles.dtype
    computed = _computed(particles)
    particles, others = (None if rows is None else rows.detach().to(computed) for rows in (particles, others))
    rows = len(particles) + (0 if others is None else len(others))
    product = None
    if rows > 1 and not _is_identity(lengthscale):
        contrasts = operations.contrasts(particles, others, normalize, eps)
        factors = _factors(lengthscale, contrasts)
        if factors is not None:
            x = matmul(contrasts, factors[0], precision)
            rest = normalize, eps, dtype, precision
            return _distances_by_factors(operations, particles, others, x, *factors, *rest)
        product = _product(lengthscale, contrasts, precision)
    d, alignment, norm = operations.pair_distances(particles, others, product, normalize, eps)
    return d, ByProduct(particles, others, product, norm, alignment, normalize, dtype, operations)


def _distances_by_factors(operations, particles, others, x, factor, tail, normalize, eps, dtype, precision):
    x = operations.coordinates(particles, others, x, normalize, eps)
    x, x_others = x[: len(particles)], None if others is None else x[len(particles) :]
    d, _, norm = operations.pair_distances(x, x_others, None, False, eps)
    if tail:
        d = d + tail * operations.pair_distances(particles, others, None, normalize, eps)[0]
    return d, ByFactors(
        particles, others, x, x_others, norm, factor, tail, normalize, eps, dtype, precision, operations
    )


@torch.no_grad()
def _combine(state, c: Tensor, projection: Tensor | None = None) -> Tensor:
    return state.combine(c.to(state.norm.dtype), projection).to(state.dtype)


def _fused(name, operations, particles, lengthscale, normalize, eps, precision, half):
    dtype, product = particles.dtype, None
    particles = particles.detach() if particles.requires_grad else particles
    members = particles.shape[0]
    log_count, weighed = DEFAULT.log_count(members), members > 1 and not _is_identity(lengthscale)
    if weighed or name != "cpp":  # which widens what it reads by itself, but no contrasts
        particles = particles.to(_computed(particles))
    if half:
        return _narrowed(operations.fused_low_rank(particles, *half, eps, log_count), dtype)
    if weighed:
        factors = _factors(lengthscale, particles) if name == "cpp" else None
        if factors is not None:
            return _narrowed(operations.fused_by_factor(particles, *factors, normalize, eps, log_count), dtype)
        product = _product(lengthscale, operations.contrasts(particles, None, normalize, eps), precision)
    return _narrowed(operations.fused(particles, product, normalize, eps, log_count), dtype)


def _half_factor(particles, lengthscale, normalize, precision):
    """(F in tiles of float16, its unit, the tail) for fused_low_rank, or None for what it does not do."""
    members, _, size = particles.shape
    fits = 2 <= members <= LOW_RANK_MEMBERS and size % 4 == 0 and _computed(particles) == torch.float32
    if not (fits and normalize and precision == "tf32" and isinstance(lengthscale, PCA) and _is_hopper(particles)):
        return None
    factors = lengthscale.factors(torch.float32, particles.device)
    if factors is None or factors[0].shape[1] > LOW_RANK:
        return None
    return *lengthscale.in_tiles(particles.device), factors[1]


def _is_hopper(particles: Tensor) -> bool:
    """Whether "tf32" means something there, and fused_low_rank is written and compiled for it."""
    if not particles.is_cuda:
        return _rounds(particles.device)
    return operators.HAS_LOW_RANK and torch.cuda.get_device_capability(particles.device)[0] == 9


def _narrowed(results, dtype: torch.dtype) -> Repulsion:
    """value, gradient, bandwidth, distances in the dtypes of a result for particles of this dtype."""
    value, gradient, h, d = results
    wide = operators.accumulation_dtype(dtype)
    if gradient.dtype == dtype and value.dtype == wide:
        return Repulsion(value, gradient, h, d)
    return Repulsion(value.to(wide), gradient.to(dtype), h.to(wide), d.to(wide))


@torch.no_grad()
def _at_once(operations, particles, lengthscale, normalize, eps, precision):
    dtype, particles = particles.dtype, particles.detach().to(_computed(particles))
    acc, log_count = operators.accumulation_dtype(particles.dtype), DEFAULT.log_count(len(particles))
    factors = _factors(lengthscale, particles)
    rounded = normalize and precision == "tf32" and acc == torch.float32 and _rounds(particles.device)
    half = lengthscale.in_half(particles.device) if rounded and isinstance(lengthscale, PCA) else None
    if factors is not None:
        first = half or (factors[0], 1.0)
        results = operations.at_once_low_rank(particles, factors[0], *first, factors[1], eps, log_count, precision)
    else:
        product = None
        if half is None and not _is_identity(lengthscale):
            product = _product(lengthscale, operations.contrasts(particles, None, normalize, eps), precision)
        matrix = half or (None, 1.0)
        results = operations.at_once(particles, product, *matrix, normalize, eps, log_count)
    return _narrowed(results, dtype)


def _rounds(device: torch.device) -> bool:
    """Whether precision="tf32" means something there."""
    return device.type == "cuda"


def _fits_at_once(particles, lengthscale, others, normalize, bandwidth) -> bool:
    acc = operators.accumulation_dtype(_computed(particles))
    few = 2 <= len(particles) <= operators.MOST_AT_ONCE[acc]
    if not (few and others is None and _is_default(bandwidth)):
        return False
    return normalize or not hasattr(lengthscale, "factors") or lengthscale.factors(acc, particles.device) is None


def _computed(particles: Tensor) -> torch.dtype:
    return torch.float64 if particles.shape[2] <= EXACT_COLUMNS else particles.dtype


@torch.no_grad()
def _factors(lengthscale, rows):
    """F [D, K] and the tail for rows of this dtype and on this device, or None."""
    dtype = operators.accumulation_dtype(rows.dtype)
    return lengthscale.factors(dtype, rows.device) if hasattr(lengthscale, "factors") else None


def _choose(backend: str, particles, others, lengthscale, normalize, eps, precision):
    """Validate, then the backend's name and the module or namespace that has its operations."""
    check_backend(backend)
    validation.lengthscale(lengthscale)
    validation.particles_and_others(particles, others, getattr(lengthscale, "dimension", None))
    validation.truth(normalize, "normalize")
    validation.positive(eps, "eps")
    validation.one_of(precision, "precision", PRECISIONS)
    if backend == "auto":
        fast = "triton" if particles.is_cuda else "cpp"
        backend = "reference" if operators.UNUSABLE[fast] else fast
    if backend == "reference":
        from forde_fast import reference

        return backend, reference
    interpreted = backend == "triton" and particles.is_cpu and operators.TRITON_INTERPRETS
    if not (interpreted or (particles.is_cpu if backend == "cpp" else particles.is_cuda)):
        where = f"the particles are on {particles.device}"
        refuse("backend", f"one for these particles, not {backend!r}", where, RuntimeError)
    if interpreted:  # the same kernels, run by Triton's interpreter on CPU tensors
        from forde_fast.kernels import operations

        return backend, operations
    return backend, torch.ops.forde_fast


def _check_fused(particles, alone: bool, others, bandwidth) -> None:
    """RuntimeError for what the CUDA C++ kernels do not do; alone: whether they need no contrasts made beforehand."""

    def need(holds, expected, got):
        expect(holds, "backend", f"'triton', or for 'cuda' {expected}", got, RuntimeError)

    need(len(particles) <= FUSED_MEMBERS, f"at most {FUSED_MEMBERS} particles", len(particles))
    need(others is None, "particles that repel each other", "others")
    need(_is_default(bandwidth), "the default bandwidth", bandwidth)
    reason = operators.UNUSABLE["triton"]
    need(alone or not reason, "no lengthscale, as its contrasts are Triton's", reason)


@torch.no_grad()
def _product(lengthscale, contrasts, precision):
    rows = contrasts.flatten(0, 1)
    product = lengthscale.product(rows, precision) if isinstance(lengthscale, PCA) else lengthscale.product(rows)
    return product.view_as(contrasts)


def _is_default(bandwidth) -> bool:
    return isinstance(bandwidth, (str, Median)) and bandwidth in ("median", DEFAULT)


def _is_identity(lengthscale) -> bool:
    return lengthscale is None or isinstance(lengthscale, Identity)


def _check_norms(name: str, particles: Tensor, others: Tensor | None, normalize: bool) -> None:
    """ValueError for rows that are not finite, or whose squared norm is not: divided by that they would be 0, which
    nothing shows afterwards. (C++ sees to it by itself.)"""
    if torch.compiler.is_compiling():
        return
    dtype = operators.accumulation_dtype(particles.dtype if name == "reference" else _computed(particles))
    for rows in (particles, others):
        if rows is not None:
            rows = rows.detach().to(dtype)
            largest = rows.square().sum(-1).amax() if normalize else rows.abs().amax()
            _check_finite(particles, others, largest)


def _check_finite(particles: Tensor, others: Tensor | None, outcome: Tensor) -> None:
    """ValueError for NaN or infinity, told by `outcome`: the particles are read again only to say where."""
    if particles.is_cuda or torch.compiler.is_compiling():
        return
    alone = particles.shape[0] == 1 and others is None  # there is no pair that would show it
    sound = math.isfinite(outcome.item())
    if sound and not alone:
        return
    for tensor, name in ((particles, "particles"), (others, "others")):
        if tensor is not None:
            validation.finite(tensor.detach(), name)
    expected = "squared norms and distances within the range of their dtype"
    expect(sound, "particles", expected, "an overflow", validation.NotFinite)
