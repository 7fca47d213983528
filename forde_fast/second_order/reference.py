"""Batch normalisation with ReLU and residual, once and twice differentiated: the formulas, in plain PyTorch.

x [N, C, ...]; per channel, with n its count of numbers, mean m, variance v and r = 1 / sqrt(v + eps):

    z = mask (w xhat + b + residual),  xhat = (x - m) r,  mask = 1 where this is positive (1 everywhere without ReLU)

Backward, with g the cotangent of z times mask and <.> a mean over n:

    db = sum g      dw = sum g xhat      dx = w r P g      dresidual = g      P g = g - <g> - xhat <g xhat>

Twice backward, with (u, dw', db', u') the cotangents of (dx, dw, db, dresidual), from dr = - r^2 <xhat dx> and
dxhat = r P dx, P being symmetric:

    cotangent of g    mask (w r P u + dw' xhat + db' + u')
    cotangent of w    r (sum u g - n <u> <g> - n <u xhat> <g xhat>) = r sum u P g
    cotangent of x    - w r^2 [ xhat <u P g> + <u xhat> P g + <g xhat> P u ] + dw' r P g

In evaluation mode m and r are constants: every mean above is 0, which 1 / n = 0 brings about.

statistics [4, C] in float64: m, r, 1 / n, v. Sums are [rows, C] in float64, so that ranks can add theirs.
"""

import torch
from torch import Tensor


def norm_statistics(x: Tensor, eps: float, members: int = 1) -> Tensor:
    assert members == 1  # torch.vmap is for more
    over = [k for k in range(x.ndim) if k != 1]
    wide = x.double()
    mean, variance = wide.mean(over), wide.var(over, correction=0)
    share = torch.full_like(mean, x.shape[1] / x.numel())
    return torch.stack([mean, (variance + eps).rsqrt(), share, variance])


def norm_forward(x, residual, statistics, weight, bias, relu) -> Tensor:
    y = _affine(_normalised(x, statistics), weight, bias)
    y = y if residual is None else y + residual
    return y.relu() if relu else y


def norm_backward_sums(g, x, z, statistics, weight, bias, relu) -> Tensor:
    """[2, C]: sum g, sum g xhat"""
    xhat = _normalised(x, statistics)
    g = g * _mask(xhat, z, weight, bias, relu)
    return torch.stack([_sum(g), _sum(g * xhat)])


def norm_backward(g, x, z, statistics, weight, bias, relu, sums, residual) -> tuple[Tensor, Tensor]:
    """dx, dresidual (empty where there is no residual)"""
    xhat = _normalised(x, statistics)
    g = g * _mask(xhat, z, weight, bias, relu)
    dx = _scale(x, statistics, weight) * _project(g, xhat, sums * statistics[2])
    return dx, g if residual else x.new_empty(0)


def norm_double_sums(u, g, x, z, statistics, weight, bias, relu) -> Tensor:
    """[3, C]: sum u, sum u xhat, sum u g"""
    xhat = _normalised(x, statistics)
    g = g * _mask(xhat, z, weight, bias, relu)
    return torch.stack([_sum(u), _sum(u * xhat), _sum(u * g)])


def norm_double_backward(
    u, u_residual, v, g, x, z, statistics, weight, bias, relu, sums, double_sums
) -> tuple[Tensor, Tensor]:
    """The cotangents of g and x. v [2, C]: db', dw'. double_sums [3, C]; with v [5, C]: dw' sums too."""
    xhat = _normalised(x, statistics)
    mask = _mask(xhat, z, weight, bias, relu)
    g = g * mask
    r, scale = _row(statistics[1], x), _scale(x, statistics, weight)
    means, double_means = sums * statistics[2], double_sums * statistics[2]
    pg, pu = _project(g, xhat, means), _project(u, xhat, double_means)
    upg = double_means[2] - double_means[0] * means[0] - double_means[1] * means[1]
    dg = scale * pu
    dx = -scale * r * (xhat * _row(upg, x) + _row(double_means[1], x) * pg + _row(means[1], x) * pu)
    if v is not None:
        dg = dg + _row(v[0], x) + _row(v[1], x) * xhat
        dx = dx + r * (_row(v[1], x) * g - _row(double_means[3], x) - xhat * _row(double_means[4], x))
    if u_residual is not None:
        dg = dg + u_residual
    return dg * mask, dx


def norm_weight_cotangent(double_sums, sums, statistics, weight) -> Tensor:
    """r sum u P g [C], like the weight, from the sums over the numbers that are here and those over all."""
    means = (double_sums[:2] * sums[:2]).sum(0) * statistics[2]
    return ((double_sums[2] - means) * statistics[1]).to(weight.dtype)


def norm_track_(running_mean, running_variance, tracked, statistics, momentum) -> None:
    """As PyTorch's batch normalisation keeps its running statistics, in place."""
    mean, _, share, variance = statistics
    for running, now in ((running_mean, mean), (running_variance, variance / (1 - share))):
        running.copy_(torch.lerp(running, now.to(running.dtype), momentum))  # lerp_ has no rule under torch.vmap
    if tracked is not None:
        tracked.add_(1)


def _row(values: Tensor, x: Tensor) -> Tensor:
    """[C] -> [C, 1, ...], in the type of x"""
    return values.to(x.dtype).view(-1, *[1] * (x.ndim - 2))


def _sum(x: Tensor) -> Tensor:
    return x.double().sum([k for k in range(x.ndim) if k != 1])


def _normalised(x: Tensor, statistics: Tensor) -> Tensor:
    return (x - _row(statistics[0], x)) * _row(statistics[1], x)


def _affine(xhat: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    y = xhat if weight is None else xhat * _row(weight, xhat)
    return y if bias is None else y + _row(bias, xhat)


def _scale(x: Tensor, statistics: Tensor, weight: Tensor | None) -> Tensor:
    return _row(statistics[1] if weight is None else statistics[1] * weight, x)


def _mask(xhat: Tensor, z: Tensor | None, weight: Tensor | None, bias: Tensor | None, relu: bool) -> Tensor:
    """As torch's ReLU has it: NaN passes."""
    if not relu:
        return torch.ones_like(xhat)
    return (~((_affine(xhat, weight, bias) if z is None else z) <= 0)).to(xhat.dtype)


def _project(g: Tensor, xhat: Tensor, means: Tensor) -> Tensor:
    return g - _row(means[0], g) - xhat * _row(means[1], g)
