"""A batch normalisation with ReLU and residual, forward, backward and twice backward, in Triton.

The formulas stand in forde_fast/second_order/reference.py. A dense x is [N, C, S], or with channels last [N S, C, 1]:
N S positions of C channels. Sums over the positions of each channel take two launches, those over a part of the
positions and their total, so results are deterministic; what is done to each number takes one, whose programs make
their channels' coefficients from the sums. Nothing else runs on the device.
"""

import torch
import triton
import triton.language as tl

from .layouts import _launch

WARPS = 8
SUM_PROGRAMS = 264  # two for each multiprocessor of the largest chips: the fewer, the fewer parts there are to add
CHANNELS = 64  # of a program where they are neighbours in memory: 128 bytes of bfloat16, a whole line


@triton.jit
def _positions(first, positions, c, C, S, POSITIONS: tl.constexpr, LAST: tl.constexpr):
    """Offsets [POSITIONS, channels] from position `first` on, and which of them are there."""
    p = first + tl.arange(0, POSITIONS)
    inside = (p < positions)[:, None] & (c < C)[None, :]
    if LAST:
        return p[:, None] * C + c[None, :], inside
    return (p // S * C * S + p % S)[:, None] + c[None, :].to(tl.int64) * S, inside


@triton.jit
def _row(rows, number, c, C, ACC: tl.constexpr):
    """Row `number` of [rows, C] at the channels c -> [1, channels]."""
    return tl.load(rows + number * C + c, mask=c < C, other=0.0).to(ACC)[None, :]


@triton.jit
def _affine(
    weight, bias, c, C, HAS_WEIGHT: tl.constexpr, HAS_BIAS: tl.constexpr, CHANNELS: tl.constexpr, ACC: tl.constexpr
):
    w = tl.full([1, CHANNELS], 1.0, ACC)
    b = tl.zeros([1, CHANNELS], ACC)
    if HAS_WEIGHT:
        w = _row(weight, 0, c, C, ACC)
    if HAS_BIAS:
        b = _row(bias, 0, c, C, ACC)
    return w, b


@triton.jit
def _numbers(tensor, at, inside, ACC: tl.constexpr):
    return tl.load(tensor + at, mask=inside, other=0.0).to(ACC)


@triton.jit
def _masked(value, xhat, z, at, inside, w, b, RELU: tl.constexpr, HAS_Z: tl.constexpr):
    """NaN passes, as through torch's ReLU."""
    if RELU:
        before = xhat * w + b
        if HAS_Z:
            before = tl.load(z + at, mask=inside, other=1.0).to(value.dtype)
        return tl.where(before <= 0, 0.0, value)
    else:
        return value


@triton.jit
def _sums_kernel(
    x, z, g, u,  # [N, C, S]
    statistics,  # [4, C]
    weight, bias,  # [C]
    parts,  # [splits, COUNT, C]
    positions, C, S,
    PASS: tl.constexpr, RELU: tl.constexpr, HAS_Z: tl.constexpr, HAS_WEIGHT: tl.constexpr, HAS_BIAS: tl.constexpr,
    COUNT: tl.constexpr, STEPS: tl.constexpr, UNROLL: tl.constexpr, POSITIONS: tl.constexpr, CHANNELS: tl.constexpr,
    LAST: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """moments: sums of x less the channel's first number (so squares cancel less), and of its square; backward: of g
    and g xhat; double: of u, u xhat and u g."""
    split = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    if PASS == "moments":
        mean = _row(x, 0, c * S, C * S, ACC)
        r = tl.full([1, CHANNELS], 1.0, ACC)
    else:
        mean = _row(statistics, 0, c, C, ACC)
        r = _row(statistics, 1, c, C, ACC)
    w, b = _affine(weight, bias, c, C, HAS_WEIGHT, HAS_BIAS, CHANNELS, ACC)
    first = tl.zeros([POSITIONS, CHANNELS], ACC)
    second = tl.zeros_like(first)
    third = tl.zeros_like(first)
    for several in range(STEPS // UNROLL):
        for one in tl.static_range(UNROLL):  # so many loads are on their way at once
            step = split * STEPS + several * UNROLL + one
            at, inside = _positions(step * POSITIONS, positions, c, C, S, POSITIONS, LAST)
            xhat = (_numbers(x, at, inside, ACC) - mean) * r
            if PASS == "moments":
                xhat = tl.where(inside, xhat, 0.0)
                first += xhat
                second += xhat * xhat
            else:
                grad = _masked(_numbers(g, at, inside, ACC), xhat, z, at, inside, w, b, RELU, HAS_Z)
                if PASS == "backward":
                    first += grad
                    second += grad * xhat
                else:
                    cotangent = _numbers(u, at, inside, ACC)
                    first += cotangent
                    second += cotangent * xhat
                    third += cotangent * grad
    out = parts + split * COUNT * C + c
    tl.store(out, tl.sum(first, 0), mask=c < C)
    tl.store(out + C, tl.sum(second, 0), mask=c < C)
    if COUNT == 3:
        tl.store(out + 2 * C, tl.sum(third, 0), mask=c < C)


@triton.jit
def _total_kernel(
    parts,  # [splits, COUNT, C]
    x,  # [N, C, S]
    out,  # float64: sums [COUNT, C], or statistics [4, C]
    splits, positions, C, S,
    PASS: tl.constexpr, COUNT: tl.constexpr, EPS: tl.constexpr, STEPS: tl.constexpr, SPLITS: tl.constexpr,
    CHANNELS: tl.constexpr,
):  # fmt: skip
    c = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    known = c < C
    for row in tl.static_range(COUNT):
        total = tl.zeros([SPLITS, CHANNELS], tl.float64)
        for step in range(STEPS):
            split = step * SPLITS + tl.arange(0, SPLITS)
            at = (split * COUNT + row)[:, None] * C + c[None, :]
            total += _numbers(parts, at, (split < splits)[:, None] & known[None, :], tl.float64)
        if PASS == "moments":
            if row == 0:
                mean = tl.sum(total, 0) / positions.to(tl.float64)
            else:
                variance = tl.sum(total, 0) / positions.to(tl.float64) - mean * mean
                variance = tl.where(variance < 0, 0.0, variance)
                shift = tl.load(x + c * S, mask=known, other=0.0).to(tl.float64)
                tl.store(out + c, shift + mean, mask=known)
                tl.store(out + C + c, 1.0 / tl.sqrt(variance + EPS), mask=known)
                tl.store(out + 2 * C + c, tl.zeros_like(mean) + 1.0 / positions.to(tl.float64), mask=known)
                tl.store(out + 3 * C + c, variance, mask=known)
        else:
            tl.store(out + row * C + c, tl.sum(total, 0), mask=known)


@triton.jit
def _apply_kernel(
    x, z, g, u, extra,  # [N, C, S]; extra: the residual, or its cotangent
    out, other,  # [N, C, S]
    statistics,  # [4, C]
    weight, bias,  # [C]
    sums, double_sums,  # [2, C], [3 or 5, C]
    v,  # [2, C]
    positions, C, S,
    PASS: tl.constexpr, RELU: tl.constexpr, HAS_Z: tl.constexpr, HAS_WEIGHT: tl.constexpr, HAS_BIAS: tl.constexpr,
    HAS_EXTRA: tl.constexpr, HAS_OTHER: tl.constexpr, HAS_V: tl.constexpr, STEPS: tl.constexpr,
    POSITIONS: tl.constexpr, CHANNELS: tl.constexpr, LAST: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """forward: z; backward: dx and the residual's gradient; double: the cotangents of g and x."""
    c = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    mean = _row(statistics, 0, c, C, ACC)
    r = _row(statistics, 1, c, C, ACC)
    w, b = _affine(weight, bias, c, C, HAS_WEIGHT, HAS_BIAS, CHANNELS, ACC)
    if PASS != "forward":
        share = _row(statistics, 2, c, C, ACC)
        scale = w * r
        g1 = _row(sums, 0, c, C, ACC) * share
        gx = _row(sums, 1, c, C, ACC) * share
    if PASS == "double":
        both = scale * r
        u1 = _row(double_sums, 0, c, C, ACC) * share
        ux = _row(double_sums, 1, c, C, ACC) * share
        ug = _row(double_sums, 2, c, C, ACC) * share
        dg_1 = -scale * u1
        dg_x = -scale * ux
        dx_1 = both * (ux * g1 + gx * u1)
        dx_x = -both * (ug - u1 * g1 - 3 * ux * gx)
        dx_g = -both * ux
        dx_u = -both * gx
        if HAS_V:
            dw = _row(v, 1, c, C, ACC)
            dg_1 += _row(v, 0, c, C, ACC)
            dg_x += dw
            dx_1 -= r * _row(double_sums, 3, c, C, ACC) * share
            dx_x -= r * _row(double_sums, 4, c, C, ACC) * share
            dx_g += r * dw
    for step in range(STEPS):
        first = (tl.program_id(0).to(tl.int64) * STEPS + step) * POSITIONS
        at, inside = _positions(first, positions, c, C, S, POSITIONS, LAST)
        xhat = (_numbers(x, at, inside, ACC) - mean) * r
        if PASS == "forward":
            y = xhat * w + b
            if HAS_EXTRA:
                y += _numbers(extra, at, inside, ACC)
            if RELU:
                y = tl.where(y <= 0, 0.0, y)
            tl.store(out + at, y, mask=inside)
        else:
            grad = _masked(_numbers(g, at, inside, ACC), xhat, z, at, inside, w, b, RELU, HAS_Z)
            if PASS == "backward":
                tl.store(out + at, scale * (grad - g1 - gx * xhat), mask=inside)
                if HAS_OTHER:
                    tl.store(other + at, grad, mask=inside)
            else:
                cotangent = _numbers(u, at, inside, ACC)
                y = dg_1 + dg_x * xhat + scale * cotangent
                if HAS_EXTRA:
                    y += _numbers(extra, at, inside, ACC)
                tl.store(out + at, _masked(y, xhat, z, at, inside, w, b, RELU, HAS_Z), mask=inside)
                tl.store(other + at, dx_1 + dx_x * xhat + dx_g * grad + dx_u * cotangent, mask=inside)


@triton.jit
def _track_kernel(
    running_mean, running_variance,  # [C]
    tracked,  # []: batches seen so far
    statistics,  # [4, C]
    C,
    MOMENTUM: tl.constexpr, COUNTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    c = tl.arange(0, BLOCK)
    known = c < C
    mean = tl.load(statistics + c, mask=known, other=0.0)
    share = tl.load(statistics + 2 * C + c, mask=known, other=0.0)
    variance = tl.load(statistics + 3 * C + c, mask=known, other=0.0) / (1.0 - share)
    before = tl.load(running_mean + c, mask=known, other=0.0)
    tl.store(running_mean + c, before + (mean - before) * MOMENTUM, mask=known)
    before = tl.load(running_variance + c, mask=known, other=0.0)
    tl.store(running_variance + c, before + (variance - before) * MOMENTUM, mask=known)
    if COUNTS:
        tl.store(tracked, tl.load(tracked) + 1)


@triton.jit
def _weight_kernel(
    double_sums,  # [3, C]
    sums,  # [2, C]
    statistics,  # [4, C]
    out,  # [C]
    C,
    BLOCK: tl.constexpr,
):
    c = tl.arange(0, BLOCK)
    known = c < C
    products = tl.load(double_sums + c, mask=known, other=0.0) * tl.load(sums + c, mask=known, other=0.0)
    products += tl.load(double_sums + C + c, mask=known, other=0.0) * tl.load(sums + C + c, mask=known, other=0.0)
    products *= tl.load(statistics + 2 * C + c, mask=known, other=0.0)
    ug = tl.load(double_sums + 2 * C + c, mask=known, other=0.0)
    tl.store(out + c, (ug - products) * tl.load(statistics + C + c, mask=known, other=0.0), mask=known)


class _Call:
    """The tensors of a call as dense [outer, C, inner], in the order of x."""

    def __init__(self, kind, x, statistics=None, weight=None, bias=None, relu=False):
        last = {4: torch.channels_last, 5: torch.channels_last_3d}.get(x.ndim, torch.contiguous_format)
        self.format = torch.contiguous_format if x.is_contiguous() else last
        if not x.is_contiguous(memory_format=self.format):
            self.format = torch.contiguous_format
        self.x, self.C = x.contiguous(memory_format=self.format), x.shape[1]
        self.S = x[0, 0].numel() if self.format == torch.contiguous_format else 1
        self.positions = x.numel() // self.C
        self.acc = torch.float64 if x.dtype == torch.float64 else torch.float32
        statistics = self.x if statistics is None else statistics
        self.layer = [t if t is None else t.contiguous() for t in (statistics, weight, bias)]
        self.kind, self.constants = (
            kind,
            {"PASS": kind, "RELU": relu, "HAS_WEIGHT": weight is not None, "HAS_BIAS": bias is not None},
        )
        self.constants |= {"LAST": self.S == 1, "ACC": tl.float64 if x.dtype == torch.float64 else tl.float32}
        if self.S == 1:  # neighbours in memory are channels: each thread has 16 bytes of one position, or 8: a
            channels = min(CHANNELS, triton.next_power_of_2(self.C))  # second-order pass has many coefficients
            rows = 32 * WARPS * ((8 if kind == "double" else 16) // x.element_size()) // channels
            self.tile = {"POSITIONS": rows, "CHANNELS": channels}
        else:
            self.tile = {"POSITIONS": min(1024, triton.next_power_of_2(self.positions)), "CHANNELS": 1}
        self.blocks = triton.cdiv(self.C, self.tile["CHANNELS"])
        self.tiles = triton.cdiv(self.positions, self.tile["POSITIONS"])

    def new(self):
        return torch.empty_like(self.x, memory_format=self.format)

    def launch(self, kernel, steps, optional, rest, constants):
        """With every tensor that is not there replaced by one that is not read."""
        optional = [t if t is None else t.contiguous(memory_format=self.format) for t in optional]
        tensors = [self.x if t is None else t for t in (self.x, *optional, *rest)]
        constants = self.tile | self.constants | constants | {"STEPS": steps, "num_warps": WARPS}
        grid = triton.cdiv(self.tiles, steps), self.blocks
        _launch(kernel, grid, tensors, (self.positions, self.C, self.S), constants)

    def sum(self, g=None, u=None, z=None, eps=0.0):
        """[COUNT, C], or of moments the statistics [4, C]; float64"""
        kind, count = self.kind, 3 if self.kind == "double" else 2
        steps = triton.next_power_of_2(triton.cdiv(self.tiles, triton.cdiv(SUM_PROGRAMS, self.blocks)))
        splits = triton.cdiv(self.tiles, steps)
        parts = torch.empty(splits, count, self.C, dtype=self.acc, device=self.x.device)
        constants = {"COUNT": count, "HAS_Z": z is not None, "UNROLL": min(4, steps)}
        self.launch(_sums_kernel, steps, (z, g, u), (*self.layer, parts), constants)
        out = torch.empty(4 if kind == "moments" else count, self.C, dtype=torch.float64, device=self.x.device)
        several, channels = min(64, triton.next_power_of_2(splits)), min(8, triton.next_power_of_2(self.C))
        constants = {"PASS": kind, "COUNT": count, "EPS": eps, "STEPS": triton.cdiv(splits, several)}
        constants |= {"SPLITS": several, "CHANNELS": channels, "num_warps": 4}
        numbers = splits, self.positions, self.C, self.S
        _launch(_total_kernel, (triton.cdiv(self.C, channels),), (parts, self.x, out), numbers, constants)
        return out

    def apply(self, out, other=None, g=None, u=None, z=None, extra=None, sums=None, double_sums=None, v=None):
        constants = {"HAS_Z": z is not None, "HAS_EXTRA": extra is not None}
        constants |= {"HAS_OTHER": other is not None, "HAS_V": v is not None}
        rows = [t if t is None else t.contiguous() for t in (sums, double_sums, v)]
        steps = min(8, triton.next_power_of_2(triton.cdiv(self.tiles * self.blocks, 4 * SUM_PROGRAMS)))
        self.launch(_apply_kernel, steps, (z, g, u, extra), (out, other, *self.layer, *rows), constants)


def norm_statistics(x, eps):
    return _Call("moments", x).sum(eps=eps)


def norm_forward(x, residual, statistics, weight, bias, relu):
    call = _Call("forward", x, statistics, weight, bias, relu)
    out = call.new()
    call.apply(out, extra=residual)
    return out


def norm_backward_sums(g, x, z, statistics, weight, bias, relu):
    return _Call("backward", x, statistics, weight, bias, relu).sum(g=g, z=z)


def norm_backward(g, x, z, statistics, weight, bias, relu, sums, residual):
    call = _Call("backward", x, statistics, weight, bias, relu)
    dx, masked = call.new(), call.new() if residual else None
    call.apply(dx, masked, g=g, z=z, sums=sums)
    return dx, masked if residual else x.new_empty(0)


def norm_double_sums(u, g, x, z, statistics, weight, bias, relu):
    return _Call("double", x, statistics, weight, bias, relu).sum(g=g, u=u, z=z)


def norm_double_backward(u, u_residual, v, g, x, z, statistics, weight, bias, relu, sums, double_sums):
    call = _Call("double", x, statistics, weight, bias, relu)
    dg, dx = call.new(), call.new()
    call.apply(dg, dx, g=g, u=u, z=z, extra=u_residual, sums=sums, double_sums=double_sums, v=v)
    return dg, dx


def norm_weight_cotangent(double_sums, sums, statistics, weight):
    out, C = torch.empty_like(weight), len(weight)
    constants = {"BLOCK": triton.next_power_of_2(C), "num_warps": 4}
    tensors = double_sums.contiguous(), sums.contiguous(), statistics.contiguous(), out
    _launch(_weight_kernel, (1,), tensors, (C,), constants)
    return out


def norm_track_(running_mean, running_variance, tracked, statistics, momentum):
    C = len(running_mean)
    constants = {"MOMENTUM": momentum, "COUNTS": tracked is not None, "BLOCK": triton.next_power_of_2(C)}
    tensors = running_mean, running_variance, running_mean if tracked is None else tracked, statistics.contiguous()
    _launch(_track_kernel, (1,), tensors, (C,), constants | {"num_warps": 4})
