"""The kernels that hold all N rows of one sample as a tile [rows, columns]: norms, contrasts, combine.

Rows are the particles, then the others if there are any. Offsets grow from 64-bit row and sample numbers, since
M G D may pass 2^31. The launchers switch multiply-add contraction off: fma(r, p, -s') would see the unrounded
product on one side only, equal rows would differ by a rounding, and a coefficient of 1e12 would show it. Where
a fused multiply-add is welcome it is written out.
"""

import triton
import triton.language as tl


@triton.jit
def _inverse_root(x):
    # the default float32 root and division are approximate: an error in r stays in full in s_i - s_j
    if x.dtype == tl.float64:
        return 1.0 / tl.sqrt(x)
    else:
        return tl.div_rn(1.0, tl.sqrt_rn(x))


@triton.jit
def _load_rows(
    particles, others, particles_m, others_m, n, d, D, MI: tl.constexpr, N: tl.constexpr, ACC: tl.constexpr
):
    """Rows n [R, 1], columns d [1, C] of one sample -> [R, C], 0 outside."""
    inside = d < D
    rows = tl.load(particles + n * particles_m + d, mask=(n < MI) & inside, other=0.0).to(ACC)
    if N > MI:
        more = tl.load(others + (n - MI) * others_m + d, mask=(n >= MI) & (n < N) & inside, other=0.0).to(ACC)
        rows = tl.where(n < MI, rows, more)
    return rows


@triton.jit
def _square_norms(
    particles, others, particles_m, others_m, n, lo, hi, D,
    MI: tl.constexpr, N: tl.constexpr, BLOCK_D: tl.constexpr, ACC: tl.constexpr,
):
    """Sums of squares over columns lo to hi -> [R]."""
    total = tl.zeros([n.shape[0], BLOCK_D], ACC)
    for start in range(lo, hi, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)[None, :]
        rows = _load_rows(particles, others, particles_m, others_m, n, d, D, MI, N, ACC)
        total = tl.fma(rows, rows, total)
    return tl.sum(total, 1)


@triton.jit
def _norms_kernel(
    particles,  # [MI, G, D]
    others,  # [MJ, G, D]
    norms,  # [splits, N, G]: partial sums of squares, or 1 / norm where one program sees all of D
    D, G, splits, chunk, particles_m, particles_g, others_m, others_g,
    MI: tl.constexpr, N: tl.constexpr, EPS: tl.constexpr, WHOLE: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, ACC: tl.constexpr,
):
    pid = tl.program_id(0).to(tl.int64)
    g, split = pid // splits, pid % splits
    lo = split.to(tl.int32) * chunk
    n = tl.arange(0, BLOCK_N).to(tl.int64)
    squares = _square_norms(
        particles + g * particles_g, others + g * others_g, particles_m, others_m, n[:, None],
        lo, tl.minimum(lo + chunk, D), D, MI, N, BLOCK_D, ACC,
    )
    if WHOLE:
        squares = _inverse_root(squares + EPS)
    tl.store(norms + (split * N + n) * G + g, squares, mask=n < N)


@triton.jit
def _contrasts_kernel(
    particles,  # [MI, G, D]
    others,  # [MJ, G, D]
    inverse_norm,  # [N, G], read when NORM is "given"
    contrasts,  # [N - 1, G, D]
    D, G, splits, chunk, particles_m, particles_g, others_m, others_g,
    MI: tl.constexpr, N: tl.constexpr, EPS: tl.constexpr, WEIGHT: tl.constexpr, NORM: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, ACC: tl.constexpr,
):
    pid = tl.program_id(0).to(tl.int64)
    g = pid // splits
    lo = (pid % splits).to(tl.int32) * chunk
    hi = tl.minimum(lo + chunk, D)
    particles += g * particles_g
    others += g * others_g
    n = tl.arange(0, BLOCK_N).to(tl.int64)
    if NORM == "own":
        squares = _square_norms(
            particles, others, particles_m, others_m, n[:, None], lo, hi, D, MI, N, BLOCK_D, ACC
        )
        r = _inverse_root(squares + EPS)
    elif NORM == "given":
        r = tl.load(inverse_norm + n * G + g, mask=n < N, other=0.0)
    else:
        r = tl.full([BLOCK_N], 1.0, ACC)
    r_0 = tl.sum(tl.where(n == 0, r, 0.0), 0)
    n = n[:, None]
    for start in range(lo, hi, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)[None, :]
        s = _load_rows(particles, others, particles_m, others_m, n, d, D, MI, N, ACC) * r[:, None]
        s_0 = tl.load(particles + d, mask=d < D, other=0.0).to(ACC) * r_0
        # u = s_0 + sum (s_n - s_0) / (N - sqrt N): what the members share cancels before it is rounded again
        difference = tl.where(n < N, s - s_0, 0.0)
        z = difference - tl.sum(difference, 0)[None, :] * WEIGHT
        tl.store(contrasts + ((n - 1) * G + g) * D + d, z, mask=(n > 0) & (n < N) & (d < D))


@triton.jit
def _combine_kernel(
    particles,  # [MI, G, D]
    others,  # [MJ, G, D]; the particles when SAME
    product,  # [N - 1, G, D], read when HAS_PRODUCT
    inverse_norm,  # [N, G]
    coefficients,  # [MI, MJ, G]
    projection,  # [MI, G]
    gradient,  # [MI, G, D]
    D, G, tiles, particles_m, particles_g, others_m, others_g, product_m, product_g,
    MI: tl.constexpr, MJ: tl.constexpr, SAME: tl.constexpr, HAS_PRODUCT: tl.constexpr, KAPPA: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, ACC: tl.constexpr,
):
    pid = tl.program_id(0).to(tl.int64)
    g = pid // tiles
    columns = (pid % tiles).to(tl.int32) * BLOCK_D + tl.arange(0, BLOCK_D)
    particles += g * particles_g
    others += g * others_g
    product += g * product_g
    rows = tl.arange(0, BLOCK_N).to(tl.int64)
    i, d = rows[:, None], columns[None, :]
    inside = (i < MI) & (d < D)
    r = tl.load(inverse_norm + rows * G + g, mask=rows < MI, other=0.0)[:, None]
    total = tl.zeros([BLOCK_N, BLOCK_D], ACC)
    c = coefficients + rows * MJ * G + g
    if HAS_PRODUCT:
        q = tl.load(product + (i - 1) * product_m + d, mask=inside & (i > 0), other=0.0).to(ACC)
        q_0 = tl.sum(q, 0)
        if not SAME:
            for j in range(MJ):
                row = (tl.zeros([1], tl.int64) + (MI - 1 + j)) * product_m
                q_0 += tl.load(product + row + columns, mask=columns < D, other=0.0).to(ACC)
        q_0 *= KAPPA
        q = tl.where(i == 0, q_0[None, :], q)
        if SAME:
            total = (q - q_0[None, :]) * tl.load(c, mask=rows < MI, other=0.0)[:, None]
    else:
        q = tl.load(particles + i * particles_m + d, mask=inside, other=0.0).to(ACC) * r
    for j in range(1 if SAME and HAS_PRODUCT else 0, MJ):
        # one row at a time, out of L1: every program has just read it, or its neighbour has
        j_64 = tl.zeros([1], tl.int64) + j
        if HAS_PRODUCT:
            row = product + (j_64 - 1 + (0 if SAME else MI)) * product_m + columns
            q_j = tl.load(row, mask=columns < D, other=0.0).to(ACC)
        else:
            r_j = tl.load(inverse_norm + (j + (0 if SAME else MI)) * G + g)
            q_j = tl.load(others + j_64 * others_m + columns, mask=columns < D, other=0.0).to(ACC) * r_j
        c_j = tl.load(c + j * G, mask=rows < MI, other=0.0)
        total = tl.fma(tl.broadcast_to(c_j[:, None], total.shape), q - q_j[None, :], total)
    t = tl.load(projection + rows * G + g, mask=rows < MI, other=0.0)[:, None]
    s = tl.load(particles + i * particles_m + d, mask=inside, other=0.0).to(ACC) * r
    tl.store(gradient + (i * G + g) * D + d, (total - t * s) * r, mask=inside)
