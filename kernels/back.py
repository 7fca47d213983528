"""From K columns back to D: a product whose tiles become columns of the gradient before they are written."""
# ruff: noqa: RUF005 (Triton does not know (*a, b))

import triton
import triton.language as tl

from .rows import _multiple


@triton.jit
def _normalised(row, r, d, inside, ACC: tl.constexpr):
    """One row of some samples, columns first: [COLUMNS, SAMPLES]."""
    return tl.load(row[None, :] + d[:, None], mask=inside, other=0.0).to(ACC) * r[None, :]


@triton.jit
def _gradient_kernel(
    particles,  # [M, G, D]
    y,  # [M, G, K], float16
    units,  # [M, G]: of the rows of y
    factor,  # [D, K], float16, in units of FACTOR_UNIT
    inverse_norm,  # [M, G]
    coefficients,  # [M, M, G], of any strides
    projection,  # [M, G]
    gradient,  # [M, G, D]
    D, G, K, particles_m, particles_g, c_pair, c_g,
    M: tl.constexpr, TAIL: tl.constexpr, FACTOR_UNIT: tl.constexpr, SAMPLES: tl.constexpr, COLUMNS: tl.constexpr,
    RANK: tl.constexpr, V: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """(F y_i + TAIL sum_j c_ij (s_i - s_j) - projection s_i) / norm, of some samples on a few columns.

    Programs one after the other share their columns and so what they read of the factor.
    """
    D, particles_m, particles_g = _multiple(D, V), _multiple(particles_m, V), _multiple(particles_g, V)
    pid = tl.program_id(0)
    blocks = tl.cdiv(G, SAMPLES)
    g = (pid % blocks * SAMPLES + tl.arange(0, SAMPLES)).to(tl.int64)
    d = pid // blocks * COLUMNS + tl.arange(0, COLUMNS)
    k = tl.arange(0, RANK)
    here = g < G
    inside = (d < D)[:, None] & here[None, :]
    known = (k < K)[:, None] & here[None, :]
    f = tl.load(
        factor + d.to(tl.int64)[:, None] * K + k[None, :], mask=(d < D)[:, None] & (k < K)[None, :], other=0.0
    )
    s = ()
    for j in tl.static_range(M):
        if TAIL != 0:
            r = tl.load(inverse_norm + j * G + g, mask=here, other=0.0)
            s = s + (_normalised(particles + (g * 0 + j) * particles_m + g * particles_g, r, d, inside, ACC),)
    for i in range(M):
        total = tl.dot(f, tl.load(y + ((g + i * G) * K)[None, :] + k[:, None], mask=known, other=0.0))
        total *= tl.load(units + i * G + g, mask=here, other=0.0)[None, :] * FACTOR_UNIT
        r = tl.load(inverse_norm + i * G + g, mask=here, other=0.0)
        s_i = _normalised(particles + (g * 0 + i) * particles_m + g * particles_g, r, d, inside, ACC)
        for j in tl.static_range(M):
            if TAIL != 0:  # where j = i, both factors are 0
                c = tl.load(coefficients + (g * c_g + (i * M + j) * c_pair), mask=here, other=0.0) * TAIL
                total = tl.fma(tl.broadcast_to(c[None, :], total.shape), s_i - s[j], total)
        t = tl.load(projection + i * G + g, mask=here, other=0.0)
        total = (total - t[None, :] * s_i) * r[None, :]
        tl.store(gradient + ((g + i * G) * D)[None, :] + d[:, None], total, mask=inside)
