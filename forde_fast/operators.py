"""The registered operations: schemas, shapes for tracing, autograd. Implementations register themselves.

C++ (csrc/cpu) registers for CPU tensors, the Triton kernels and CUDA C++ (csrc/cuda) for CUDA tensors. A machine
without a compiler keeps the others.
"""

import functools
import os
import sys

import torch
from torch import Tensor

library = torch.library.Library("forde_fast", "DEF")

# N rows: the particles', then the others' where these are given. Results but the gradient are in float32
# (float64 for float64); alignment is (q_i - q_j) s_i. What pair_distances returns as norm [N, G] goes to combine
# unchanged: sqrt(|p|^2 + eps) from the C++ kernels, its reciprocal from the Triton ones.
library.define("contrasts(Tensor particles, Tensor? others, bool normalize, float eps) -> Tensor")
library.define(
    "pair_distances(Tensor particles, Tensor? others, Tensor? product, bool normalize, float eps)"
    " -> (Tensor distances, Tensor alignment, Tensor norm)"
)
library.define(
    "combine(Tensor particles, Tensor? others, Tensor? product, Tensor norm, Tensor coefficients,"
    " Tensor projection) -> Tensor"
)
# product [N - 1, G, K], contrasts times some matrix -> [N, G, K], the rows times that matrix up to a vector that all
# of a sample share. Normalised rows that are equal stay equal, which a matrix product on a CPU does not promise.
library.define("coordinates(Tensor particles, Tensor? others, Tensor product, bool normalize, float eps) -> Tensor")
# mixed [Mi, G, D], in the computing type, plus sum_j coefficients[i, j] (s_i - s_j) where coefficients [Mi, Mj, G]
# are given; less its component along s_i, divided by the norm. Without `normalize` the sum alone.
library.define(
    "project(Tensor particles, Tensor mixed, Tensor? others, Tensor? coefficients, bool normalize, float eps)"
    " -> Tensor"
)
# The rule for the default bandwidth, and the projection that combine takes (0 without an alignment).
library.define(
    "median_rule(Tensor distances, Tensor? alignment, float log_count)"
    " -> (Tensor value, Tensor coefficients, Tensor bandwidth, Tensor projection)"
)
# Optional: the whole operation between the particles at the default bandwidth.
library.define(
    "fused(Tensor particles, Tensor? product, bool normalize, float eps, float log_count)"
    " -> (Tensor value, Tensor gradient, Tensor bandwidth, Tensor distances)"
)
# Optional, for MOST_AT_ONCE particles: the same in fewer launches than by the steps. Where a matrix in float16 is
# given, unit times it is C, and the product is made here. The other is for C = F F^T + tail I with F the factor, of
# normalised particles; unit times first_factor is F, rounded to float16 or not.
library.define(
    "at_once(Tensor particles, Tensor? product, Tensor? matrix, float unit, bool normalize, float eps,"
    " float log_count) -> (Tensor value, Tensor gradient, Tensor bandwidth, Tensor distances)"
)
library.define(
    "at_once_low_rank(Tensor particles, Tensor factor, Tensor first_factor, float unit, float tail, float eps,"
    " float log_count, str precision) -> (Tensor value, Tensor gradient, Tensor bandwidth, Tensor distances)"
)
# Optional: `fused` for C = F F^T + tail I, factor F [D, K], between at least two particles.
library.define(
    "fused_by_factor(Tensor particles, Tensor factor, float tail, bool normalize, float eps, float log_count)"
    " -> (Tensor value, Tensor gradient, Tensor bandwidth, Tensor distances)"
)
# Optional: the same of normalised particles in float32, M at most 10 and D a multiple of 4; unit times the factor is
# F rounded to float16, in tiles [D / 8, K / 8, 8, 8] with zeros up to a multiple of 128 rows and to K = 128 or 256.
library.define(
    "fused_low_rank(Tensor particles, Tensor factor, float unit, float tail, float eps, float log_count)"
    " -> (Tensor value, Tensor gradient, Tensor bandwidth, Tensor distances)"
)
# SGD's update in one pass, on the CPU: step.descend_ says what of.
library.define(
    "descend_(Tensor(a!) parameters, Tensor(b!) velocity, Tensor g, float rate, float momentum, float weight_decay,"
    " bool nesterov) -> ()"
)
library.define("attach_gradient(Tensor particles, Tensor value, Tensor gradient) -> Tensor")
library.define("scale_gradient(Tensor particles, Tensor gradient, Tensor factor) -> Tensor")


MOST_AT_ONCE = {torch.float32: 16, torch.float64: 10}  # particles, by the type of the sums


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


@torch.library.register_fake("forde_fast::contrasts")
def _(particles, others, normalize, eps):
    rows = particles.shape[0] + (0 if others is None else others.shape[0])
    return particles.new_empty((rows - 1, *particles.shape[1:]), dtype=accumulation_dtype(particles.dtype))


@torch.library.register_fake("forde_fast::pair_distances")
def _(particles, others, product, normalize, eps):
    moving, groups = particles.shape[:2]
    repelling = moving if others is None else others.shape[0]
    rows = moving if others is None else moving + repelling
    wide = functools.partial(particles.new_empty, dtype=accumulation_dtype(particles.dtype))
    return wide((moving, repelling, groups)), wide((moving, repelling, groups)), wide((rows, groups))


@torch.library.register_fake("forde_fast::combine")
def _(particles, others, product, norm, coefficients, projection):
    return particles.new_empty(particles.shape)


@torch.library.register_fake("forde_fast::coordinates")
def _(particles, others, product, normalize, eps):
    return product.new_empty((len(product) + 1, *product.shape[1:]))


@torch.library.register_fake("forde_fast::project")
def _(particles, mixed, others, coefficients, normalize, eps):
    return particles.new_empty(particles.shape)


@torch.library.register_fake("forde_fast::median_rule")
def _(distances, alignment, log_count):
    moving, repelling, groups = distances.shape
    sizes = ((), distances.shape, (repelling, groups), (moving, groups))
    return tuple(distances.new_empty(size) for size in sizes)


@torch.library.register_fake("forde_fast::fused")
@torch.library.register_fake("forde_fast::at_once")
@torch.library.register_fake("forde_fast::at_once_low_rank")
@torch.library.register_fake("forde_fast::fused_by_factor")
@torch.library.register_fake("forde_fast::fused_low_rank")
def _(particles, *_):
    members, groups = particles.shape[:2]
    wide = functools.partial(particles.new_empty, dtype=accumulation_dtype(particles.dtype))
    return wide(()), particles.new_empty(particles.shape), wide((members, groups)), wide((members, members, groups))


@torch.library.impl(library, "attach_gradient", "CompositeExplicitAutograd")
def _(particles, value, gradient):
    return value.clone()


@torch.library.register_fake("forde_fast::attach_gradient")
def _(particles, value, gradient):
    return torch.empty_like(value)


@torch.library.impl(library, "scale_gradient", "CompositeExplicitAutograd")
def _(particles, gradient, factor):
    return (gradient * factor).to(gradient.dtype)


@torch.library.register_fake("forde_fast::scale_gradient")
def _(particles, gradient, factor):
    return torch.empty_like(gradient)


def _save(ctx, inputs, output):
    particles, _, gradient = inputs
    ctx.save_for_backward(particles, gradient)


def _first_derivative(ctx, factor: Tensor):
    particles, gradient = ctx.saved_tensors
    return torch.ops.forde_fast.scale_gradient(particles, gradient, factor), None, None


def _second_derivative(ctx, factor: Tensor):
    raise RuntimeError("forde_fast.repulsion: its value is differentiable once, a second derivative was asked for")


# particles goes through scale_gradient only so that a second derivative meets an error and not a silent zero
torch.library.register_autograd("forde_fast::attach_gradient", _first_derivative, setup_context=_save)
torch.library.register_autograd("forde_fast::scale_gradient", _second_derivative)


TRITON_INTERPRETS = os.environ.get("TRITON_INTERPRET") == "1"  # Triton reads it once, when it is imported


def _register_cpp() -> str:
    try:
        import forde_fast._C  # noqa: F401
    except ImportError as error:
        return f"the C++ extension is not built: {error}"
    return ""


def _register_triton() -> str:
    if not (torch.cuda.is_available() or TRITON_INTERPRETS):
        return "no CUDA device, and TRITON_INTERPRET=1 is not set"
    try:
        from forde_fast.kernels import operations
    except ImportError as error:
        return f"triton cannot be imported: {error}"
    for name in operations.__all__:
        library.impl(name, getattr(operations, name), "CUDA")
    return ""


def _register_cuda() -> str:
    try:
        import forde_fast._cuda  # noqa: F401
    except ImportError as error:
        return f"the CUDA extension is not built: {error}"
    return "" if torch.cuda.is_available() else "no CUDA device"


# backend -> why it cannot be used here; empty where it can. Found at import, so that torch.compile sees constants.
UNUSABLE = {"reference": "", "cpp": _register_cpp(), "triton": _register_triton(), "cuda": _register_cuda()}
# Whether Hopper's kernel for low ranks was compiled: elsewhere it would only stop the device.
HAS_LOW_RANK = not UNUSABLE["cuda"] and getattr(sys.modules["forde_fast._cuda"], "has_low_rank", False)
