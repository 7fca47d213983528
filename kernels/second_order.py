"""A batch normalisation with ReLU and residual, forward, backward and twice backward, in Triton.

The formulas stand in forde_fast/second_order/reference.py. A dense x [N, C, S], or with channels last [N S, C, 1], is
read once by a pass: sums over the positions of each channel, or numbers by themselves with their channel's
coefficients, which are found in plain torch on [rows, C]. Results are deterministic: partial sums go to a buffer.
"""

import torch
import triton
import triton.language as tl

PROGRAMS = 528  # four for each multiprocessor of the largest chips


@triton.jit
def _masked(value, xhat, z, at, inside, weight, bias, RELU: tl.constexpr, HAS_Z: tl.constexpr):
    """NaN passes, as through torch's ReLU."""
    if RELU:
        before = xhat * weight + bias
        if HAS_Z:
            before = tl.load(z + at, mask=inside, other=1.0).to(value.dtype)
        return tl.where(before <= 0, 0.0, value)
    else:
        return value


@triton.jit
def _sums_kernel(
    x, z, g, u,  # [N, C, S]
    coefficients,  # [rows, C]: mean, inverse deviation, weight, bias
    parts,  # [splits, COUNT, C]
    positions, C, S,
    PASS: tl.constexpr, RELU: tl.constexpr, HAS_Z: tl.constexpr, COUNT: tl.constexpr,
    STEPS: tl.constexpr, POSITIONS: tl.constexpr, CHANNELS: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    split = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    known = c < C
    k = coefficients + c
    mean, r = tl.load(k, mask=known, other=0.0)[None, :], tl.load(k + C, mask=known, other=0.0)[None, :]
    weight = tl.load(k + 2 * C, mask=known, other=0.0)[None, :]
    bias = tl.load(k + 3 * C, mask=known, other=0.0)[None, :]
    first = tl.zeros([POSITIONS, CHANNELS], ACC)
    second = tl.zeros_like(first)
    third = tl.zeros_like(first)
    for step in range(STEPS):
        p = (split * STEPS + step) * POSITIONS + tl.arange(0, POSITIONS)
        inside = (p < positions)[:, None] & known[None, :]
        at = (p // S * C * S + p % S)[:, None] + c[None, :].to(tl.int64) * S
        centred = tl.where(inside, tl.load(x + at, mask=inside, other=0.0).to(ACC) - mean, 0.0)
        xhat = centred * r
        if PASS == "moments":
            first += centred
            second += centred * centred
        else:
            grad = _masked(
                tl.load(g + at, mask=inside, other=0.0).to(ACC), xhat, z, at, inside, weight, bias, RELU, HAS_Z
            )
            if PASS == "backward":
                first += grad
                second += grad * xhat
            else:
                cotangent = tl.load(u + at, mask=inside, other=0.0).to(ACC)
                first += cotangent
                second += cotangent * xhat
                third += cotangent * grad
    out = parts + split * COUNT * C + c
    tl.store(out, tl.sum(first, 0).to(tl.float64), mask=known)
    tl.store(out + C, tl.sum(second, 0).to(tl.float64), mask=known)
    if COUNT == 3:
        tl.store(out + 2 * C, tl.sum(third, 0).to(tl.float64), mask=known)


@triton.jit
def _coefficient(coefficients, row, c, C, inside):
    return tl.load(coefficients + row * C + c, mask=inside, other=0.0)


@triton.jit
def _apply_kernel(
    x, z, g, u, extra,  # [N, C, S]; extra: the residual, or its cotangent
    out, other,  # [N, C, S]
    k,  # [rows, C]: mean, inverse deviation, weight, bias, then those of the pass
    count, C, S,
    PASS: tl.constexpr, RELU: tl.constexpr, HAS_Z: tl.constexpr, HAS_EXTRA: tl.constexpr, HAS_OTHER: tl.constexpr,
    BLOCK: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < count
    c = at // S % C
    mean, r = _coefficient(k, 0, c, C, inside), _coefficient(k, 1, c, C, inside)
    weight, bias = _coefficient(k, 2, c, C, inside), _coefficient(k, 3, c, C, inside)
    xhat = (tl.load(x + at, mask=inside, other=0.0).to(ACC) - mean) * r
    if PASS == "forward":
        y = xhat * weight + bias
        if HAS_EXTRA:
            y += tl.load(extra + at, mask=inside, other=0.0).to(ACC)
        if RELU:
            y = tl.where(y <= 0, 0.0, y)
        tl.store(out + at, y, mask=inside)
    else:
        grad = tl.load(g + at, mask=inside, other=0.0).to(ACC)
        grad = _masked(grad, xhat, z, at, inside, weight, bias, RELU, HAS_Z)
        y = _coefficient(k, 4, c, C, inside) + _coefficient(k, 5, c, C, inside) * xhat
        if PASS == "backward":
            tl.store(out + at, y + _coefficient(k, 6, c, C, inside) * grad, mask=inside)
            if HAS_OTHER:
                tl.store(other + at, grad, mask=inside)
        else:
            cotangent = tl.load(u + at, mask=inside, other=0.0).to(ACC)
            y += _coefficient(k, 6, c, C, inside) * cotangent
            if HAS_EXTRA:
                y += tl.load(extra + at, mask=inside, other=0.0).to(ACC)
            tl.store(out + at, _masked(y, xhat, z, at, inside, weight, bias, RELU, HAS_Z), mask=inside)
            dx = _coefficient(k, 7, c, C, inside) + _coefficient(k, 8, c, C, inside) * xhat
            dx += _coefficient(k, 9, c, C, inside) * grad + _coefficient(k, 10, c, C, inside) * cotangent
            tl.store(other + at, dx, mask=inside)


def _launch(kernel, grid, tensors, numbers, constants):
    with torch.cuda.device_of(tensors[0]):
        kernel[grid](*tensors, *numbers, **constants)


class _Call:
    """The tensors of a call as dense [outer, C, inner], in the order of x."""

    def __init__(self, x, statistics=None, weight=None, bias=None, relu=False):
        last = {4: torch.channels_last, 5: torch.channels_last_3d}.get(x.ndim, torch.contiguous_format)
        self.format = torch.contiguous_format if x.is_contiguous() else last
        if not x.is_contiguous(memory_format=self.format):
            self.format = torch.contiguous_format
        self.x, self.C, self.relu = x.contiguous(memory_format=self.format), x.shape[1], relu
        self.S = x[0, 0].numel() if self.format == torch.contiguous_format else 1
        self.positions = x.numel() // self.C
        self.acc = torch.float64 if x.dtype == torch.float64 else torch.float32
        if statistics is not None:
            ones, zeros = torch.ones_like(statistics[0]), torch.zeros_like(statistics[0])
            own = [ones if weight is None else weight.double(), zeros if bias is None else bias.double()]
            self.mean, self.r, self.share, _ = statistics
            self.common = [self.mean, self.r, *own]
            self.scale = own[0] * self.r

    def dense(self, tensor):
        return self.x if tensor is None else tensor.contiguous(memory_format=self.format)

    def new(self):
        return torch.empty_like(self.x, memory_format=self.format)

    def constants(self, z):
        ACC = tl.float64 if self.acc == torch.float64 else tl.float32
        return {"RELU": self.relu, "HAS_Z": z is not None, "ACC": ACC}

    def sum(self, kind, rows, g=None, u=None, z=None):
        """[COUNT, C] in float64"""
        wide = self.S == 1  # neighbours in memory are channels
        tile = {"POSITIONS": 32 if wide else 1024, "CHANNELS": 32 if wide else 1}
        blocks, count = triton.cdiv(self.C, tile["CHANNELS"]), 3 if kind == "double" else 2
        tiles = triton.cdiv(self.positions, tile["POSITIONS"])
        steps = triton.next_power_of_2(triton.cdiv(tiles, triton.cdiv(PROGRAMS, blocks)))
        splits = triton.cdiv(tiles, steps)
        parts = torch.empty(splits, count, self.C, dtype=torch.float64, device=self.x.device)
        tensors = (self.x, self.dense(z), self.dense(g), self.dense(u), torch.stack(rows).to(self.acc), parts)
        constants = {"PASS": kind, "COUNT": count, "STEPS": steps} | tile | self.constants(z)
        _launch(
            _sums_kernel, (splits, blocks), tensors, (self.positions, self.C, self.S), constants | {"num_warps": 4}
        )
        return parts.sum(0)

    def apply(self, kind, rows, out, other=None, g=None, u=None, z=None, extra=None):
        k = torch.stack(self.common + rows).to(self.acc)
        second = out if other is None else other
        tensors = (self.x, *map(self.dense, (z, g, u, extra)), out, second, k)
        constants = {"PASS": kind, "HAS_EXTRA": extra is not None, "HAS_OTHER": other is not None, "BLOCK": 1024}
        count = self.x.numel()
        grid = (triton.cdiv(count, 1024),)
        constants |= self.constants(z) | {"num_warps": 4}
        _launch(_apply_kernel, grid, tensors, (count, self.C, self.S), constants)


def norm_statistics(x, eps):
    call = _Call(x)
    shift = (
        x[0].reshape(call.C, -1)[:, 0].double()
    )  # sums are taken of x minus one of its numbers: squares cancel less
    zeros = torch.zeros_like(shift)
    mean, square = call.sum("moments", [shift, zeros, zeros, zeros]) / call.positions
    variance = (square - mean * mean).clamp(min=0)
    share = torch.full_like(mean, 1 / call.positions)
    return torch.stack([shift + mean, (variance + eps).rsqrt(), share, variance])


def norm_forward(x, residual, statistics, weight, bias, relu):
    call = _Call(x, statistics, weight, bias, relu)
    out = call.new()
    call.apply("forward", [], out, extra=residual)
    return out


def norm_backward_sums(g, x, z, statistics, weight, bias, relu):
    call = _Call(x, statistics, weight, bias, relu)
    return call.sum("backward", call.common, g=g, z=z)


def norm_backward(g, x, z, statistics, weight, bias, relu, sums, residual):
    call = _Call(x, statistics, weight, bias, relu)
    dx, masked = call.new(), call.new() if residual else None
    means = sums * call.share
    rows = [-call.scale * means[0], -call.scale * means[1], call.scale]
    call.apply("backward", rows, dx, masked, g=g, z=z)
    return dx, masked if residual else x.new_empty(0)


def norm_double_sums(u, g, x, z, statistics, weight, bias, relu):
    call = _Call(x, statistics, weight, bias, relu)
    return call.sum("double", call.common, g=g, u=u, z=z)


def norm_double_backward(u, u_residual, v, g, x, z, statistics, weight, bias, relu, sums, double_sums):
    call = _Call(x, statistics, weight, bias, relu)
    dg, dx = call.new(), call.new()
    r, scale, both = call.r, call.scale, call.scale * call.r
    g1, gx = sums * call.share
    u1, ux, ug, *rest = double_sums * call.share
    k = [-scale * u1, -scale * ux, scale, both * (ux * g1 + gx * u1)]
    k += [-both * (ug - u1 * g1 - 3 * ux * gx), -both * ux, -both * gx]
    if v is not None:
        db, dw = v
        k[0], k[1], k[3], k[4], k[5] = k[0] + db, k[1] + dw, k[3] - r * rest[0], k[4] - r * rest[1], k[5] + r * dw
    call.apply("double", k, dg, dx, g=g, u=u, z=z, extra=u_residual)
    return dg, dx
