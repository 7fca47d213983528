"""Distances between normalised rows of very many columns without a pass for their norms.

Any factors r'_n will do to sum over s'_n = r'_n p_n. With S_n = |s'_n|^2 and rho_n = 1 / sqrt(S_n + eps r'_n^2), the
norms are 1 / (rho_n r'_n) and

    d_ij = rho_i rho_j |s'_i - s'_j|^2 + (rho_i - rho_j) (rho_i S_i - rho_j S_j)

where nothing cancels so long as the rho_n differ by no more than the rows do: r'_n are the inverse norms of a sample
of the columns. Also S_i - S_j is a sum of differences, (s'_i - s'_j) (s'_i + s'_j). Where the sampled columns say
little of the rows, digits are lost; this shows in the sums, and those samples g are computed again, norms first.
"""

import triton
import triton.language as tl

from .rows import _inverse_root


@triton.jit
def _sampled_norms_kernel(
    rows,  # [M, G, D]
    norms,  # [M, G]
    D, G, rows_m, rows_g,
    M: tl.constexpr, EPS: tl.constexpr, PIECES: tl.constexpr, COLUMNS: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """1 / norm, guessed from PIECES of neighbouring columns between the first and the last one."""
    pid = tl.program_id(0).to(tl.int64)
    m, g = pid % M, pid // M
    d = tl.arange(0, PIECES).to(tl.int64)[:, None] * (D - COLUMNS) // (PIECES - 1) + tl.arange(0, COLUMNS)[None, :]
    x = tl.load(rows + m * rows_m + g * rows_g + d).to(ACC)
    total = tl.sum(tl.sum(x * x, 1), 0)
    tl.store(norms + m * G + g, _inverse_root(total * (D / (PIECES * COLUMNS)) + EPS))


@triton.jit
def _settle_kernel(
    apart,  # [M, M, G], float64: |s'_i - s'_j|^2
    along,  # [M, M, G], float64: (s'_i - s'_j) s'_i, but |s'_0|^2 in the first place
    provisional,  # [M, G]: r'
    distances,  # [M, M, G]
    alignments,  # [M, M, G]
    inverse_norm,  # [M, G]
    unsound,  # [G]: whether digits were lost
    G,
    M: tl.constexpr, EPS: tl.constexpr, WORST: tl.constexpr,
):  # fmt: skip
    """One sample, in float64, for the inverse norms as they are stored: the gradient is projected off those rows.

        (s_i - s_j) s_i = (d_ij + |s_i|^2 - |s_j|^2) / 2

    Unsound is where d came of terms WORST times as large: to the first adds what rounding of S_i - S_j can do, which
    the kernel before made of two sums of differences to row 0.
    """
    g = tl.program_id(0).to(tl.int64)
    row = tl.arange(0, 16)
    kept = row < M
    first = tl.load(along + g)  # S_0
    from_0 = tl.load(along + row * M * G + g, mask=kept, other=0.0)
    s = first + (from_0 - tl.load(along + row * G + g, mask=kept, other=0.0))
    r = tl.load(provisional + row * G + g, mask=kept, other=1.0).to(tl.float64)
    total = s + EPS * r * r
    norm = (r / tl.sqrt(total)).to(inverse_norm.dtype.element_ty)
    tl.store(inverse_norm + row * G + g, norm, mask=kept)
    rho = norm.to(tl.float64) / r

    i, j = row[:, None], row[None, :]
    inside = (i < M) & (j < M)
    at, turned = (i * M + j) * G + g, (j * M + i) * G + g
    excess = tl.load(along + at, mask=inside, other=0.0)
    excess -= tl.load(along + turned, mask=inside, other=0.0)  # S_i - S_j
    rho_i, rho_j, both_s = rho[:, None], rho[None, :], s[:, None] + s[None, :]
    large = rho_i * rho_j * tl.load(apart + at, mask=inside, other=0.0)
    d = large + 0.5 * (rho_i - rho_j) * ((rho_i - rho_j) * both_s + (rho_i + rho_j) * excess)
    d = tl.where(d < 0, 0.0, d)  # unlike a maximum, this keeps NaN
    longer = 0.5 * ((rho_i * rho_i + rho_j * rho_j) * excess + (rho_i - rho_j) * (rho_i + rho_j) * both_s)
    tl.store(distances + at, d, mask=inside)
    tl.store(alignments + at, 0.5 * (d + longer), mask=inside)

    far = tl.load(apart + row * M * G + g, mask=kept, other=0.0)
    far = tl.sqrt(far) * (tl.sqrt(tl.abs(s)) + tl.sqrt(first))
    large += tl.abs(rho_i - rho_j) * rho_i * rho_j / (rho_i + rho_j) * (far[:, None] + far[None, :])
    # so that NaN and infinity are unsound
    sound = (large <= WORST * d) & (d < float("inf")) & (first <= WORST * total)[:, None]
    tl.store(unsound + g, tl.max(tl.max(tl.where(inside & (sound == 0), 1, 0), 1), 0))
