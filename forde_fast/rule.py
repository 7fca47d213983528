"""The rule between the two stages of the operation: from distances to the value and the mixing coefficients.

Plain PyTorch on small tensors [Mi, Mj, G], in float64 whatever the particles were: the kernels' error is then
that of the distances alone. Formulas: Trinh et al., ICLR 2024, equations 16 and 17 and the published code.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from forde_fast.validation import expect, positive, refuse

FLOOR = 1e-12  # added to every median bandwidth, so that identical particles divide by something


@dataclass(frozen=True)
class Median:
    """The median heuristic h = median(d) / log(M) + 1e-12 and its variants in the literature.

    over     what one bandwidth covers: "particle" (and sample; the published code of FoRDE), "sample" (the
             paper's Algorithm 1) or "batch"
    owner    for over="particle": "second" takes the median over the moving particles i for each j,
             "first" over the repelling ones j for each i (feature-RDE)
    add_one  log(M + 1) in place of log(M) (weight- and function-RDE)
    squared  the square of the median in place of the median (feature-RDE)

    M is the number of repelling particles, taken as 2 where it is 1. Self-distances count, and an even number
    of values has the mean of the middle two as its median.
    """

    over: Literal["particle", "sample", "batch"] = "particle"
    owner: Literal["second", "first"] = "second"
    add_one: bool = False
    squared: bool = False

    def __post_init__(self):
        expect(self.over in ("particle", "sample", "batch"), "over", "particle, sample or batch", self.over)
        expect(self.owner in ("second", "first"), "owner", "second or first", self.owner)

    def __call__(self, d: Tensor) -> Tensor:
        """d [Mi, Mj, G] -> h, broadcastable to d."""
        dims = {"particle": (0,) if self.owner == "second" else (1,), "sample": (0, 1), "batch": (0, 1, 2)}
        h = median(d, dims[self.over])
        h = h.square() if self.squared else h
        return h / self.log_count(d.shape[1]) + FLOOR

    def log_count(self, repelling: int) -> float:
        """log M of so many particles that repel."""
        return math.log(max(repelling, 2 - self.add_one) + self.add_one)


class Rule:
    """What else takes distances to a gradient, in the place of a kernel density estimate and its bandwidth.

    `apply` takes d [M, M, G] in float64 to the value [], the coefficients c [M, M, G] of the gradient
    sum_j c_ij C (s_i - s_j), and a bandwidth [M, G] for the log (ones where there is none).
    """

    def apply(self, d: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        raise NotImplementedError


def median(d: Tensor, dims: tuple[int, ...]) -> Tensor:
    """The median over `dims`, kept as size 1, with the mean of the middle two (torch.median has the lower)."""
    kept = [1 if dim in dims else size for dim, size in enumerate(d.shape)]
    rest = [dim for dim in range(d.ndim) if dim not in dims]
    ordered = d.permute(*rest, *dims).flatten(len(rest)).sort(dim=-1).values
    count = ordered.shape[-1]
    return ((ordered[..., (count - 1) // 2] + ordered[..., count // 2]) / 2).reshape(kept)


def bandwidth_of(d: Tensor, bandwidth: "str | Median | float | Tensor") -> Tensor:
    """h for the distances d [Mi, Mj, G]: by a rule, or as given ([], [G] or [Mj, G], of the second particle)."""
    if isinstance(bandwidth, str):
        bandwidth = Median()
    if isinstance(bandwidth, Median):
        return bandwidth(d)
    if not isinstance(bandwidth, Tensor):
        bandwidth = d.new_full((), bandwidth)  # on the device: a copy from the host would wait for it
    return bandwidth.to(d).expand(1, *d.shape[1:])


def check_bandwidth(bandwidth, repelling: Tensor | None = None) -> None:
    """TypeError or ValueError for what is no bandwidth, or none for the particles [Mj, G, D] that repel."""
    if isinstance(bandwidth, (Median, Rule)):
        return
    if isinstance(bandwidth, str):
        if bandwidth != "median":
            refuse("bandwidth", "'median', a Median, a number or a tensor", repr(bandwidth))
    elif isinstance(bandwidth, Tensor):
        expect(bandwidth.is_floating_point(), "bandwidth", "a floating tensor", bandwidth.dtype, TypeError)
        if not (bandwidth.is_cuda or torch.compiler.is_compiling()):
            good = (bandwidth > 0) & (bandwidth < math.inf)
            if not good.all():
                refuse("bandwidth", "finite values > 0", bandwidth[~good][0].item())
        if repelling is not None:
            device, shape = repelling.device, repelling.shape[:2]
            known = bandwidth.device in (device, torch.device("cpu"))
            expect(known, "bandwidth", f"device {device}", bandwidth.device)
            pairs = zip(bandwidth.shape[::-1], shape[::-1], strict=False)
            fits = bandwidth.ndim <= 2 and all(own in (1, size) for own, size in pairs)
            expect(fits, "bandwidth", f"a shape that broadcasts to {list(shape)}", list(bandwidth.shape))
    else:
        positive(bandwidth, "bandwidth")


def kernel_rule(
    d: Tensor, bandwidth="median", groups: int | None = None, reduce: Callable[[Tensor], Tensor] | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """d [Mi, Mj, G] -> value [], c [Mi, Mj, G], bandwidth [Mj, G] ([Mi, G] where the first particle owns it).

    R = (1/G) sum_i [log sum_j sum_g exp(-d/h) - log G]; dR/ds_i = sum_j c_ij C (s_i - s_j) with
    c = -(2/G) p / h and p the kernel values normalised over j and g; c = 0 where d = 0.

    Where d has a part of the groups, of particles that repel each other: `groups` is the number of all, and `reduce`
    adds up the sums [Mi, 1, 1] of the parts, all that one group needs of another. The value is then that of all.
    """
    groups = groups or d.shape[2]
    exact = d.double()
    if isinstance(bandwidth, Rule):
        return tuple(result.to(d.dtype) for result in bandwidth.apply(exact))
    h = bandwidth_of(exact, bandwidth)
    exponents = -exact / h
    # the largest is 0, a self-distance's, unless others are given that are all far away
    top = exponents.amax((1, 2), keepdim=True) if reduce is None else exponents.new_zeros(())
    kernel = torch.exp(exponents - top)
    rows = kernel.sum((1, 2), keepdim=True)
    if reduce is not None:
        rows = reduce(rows)
    value = (top + (rows / groups).log()).sum() / groups
    c = torch.where(exact == 0, 0.0, kernel / rows / h * (-2 / groups))
    return value.to(d.dtype), c.to(d.dtype), _per_particle(h.expand_as(d), bandwidth).to(d.dtype)


def _per_particle(h: Tensor, bandwidth) -> Tensor:
    """h [Mi, Mj, G] as [Mj, G], or as [Mi, G] where the first particle owns it."""
    first = getattr(bandwidth, "owner", "second") == "first"
    return (h[:, 0] if first else h[0]).contiguous()
