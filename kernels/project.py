"""Between D columns and K: rows that are equal normalised keep equal coordinates; gradients lose their own row."""

import triton
import triton.language as tl

from .rows import _columns, _inverse_root, _load_row


@triton.jit
def _reciprocal(row, D, EPS: tl.constexpr, STEPS: tl.constexpr, BLOCK: tl.constexpr, ACC: tl.constexpr):
    squares = tl.zeros([BLOCK], ACC)
    for step in range(STEPS):
        p = _load_row(row, step * BLOCK + tl.arange(0, BLOCK), D, ACC)
        squares = tl.fma(p, p, squares)
    return _inverse_root(tl.sum(squares, 0) + EPS)


@triton.jit
def _equal(
    a, b, D, NORMALIZE: tl.constexpr, EPS: tl.constexpr, STEPS: tl.constexpr, BLOCK: tl.constexpr, ACC: tl.constexpr
):
    r_a = tl.full((), 1.0, ACC)
    r_b = tl.full((), 1.0, ACC)
    if NORMALIZE:
        r_a = _reciprocal(a, D, EPS, STEPS, BLOCK, ACC)
        r_b = _reciprocal(b, D, EPS, STEPS, BLOCK, ACC)
    differences = tl.zeros([BLOCK], tl.int32)
    for step in range(STEPS):
        d = step * BLOCK + tl.arange(0, BLOCK)
        differences += (_load_row(a, d, D, ACC) * r_a != _load_row(b, d, D, ACC) * r_b).to(tl.int32)
    return tl.sum(differences, 0) == 0


@triton.jit
def _coordinates_kernel(
    particles,  # [MI, G, D]
    others,  # [MJ, G, D]
    product,  # [N - 1, G, K]
    x,  # [N, G, K]
    D, G, K, particles_m, particles_g, others_m, others_g,
    MI: tl.constexpr, MJ: tl.constexpr, KAPPA: tl.constexpr, NORMALIZE: tl.constexpr, EPS: tl.constexpr,
    ROWS: tl.constexpr, FIRST: tl.constexpr, STEPS: tl.constexpr, STEPS_K: tl.constexpr, BLOCK: tl.constexpr,
    ACC: tl.constexpr,
):  # fmt: skip
    """Row n of x: row m - 1 of the product, KAPPA times its sum for m = 0, where m is the first row that equals n.

    Rows that differ mostly have another direction in their FIRST columns: only those that do not are read whole.
    """
    N: tl.constexpr = MI + MJ
    pid = tl.program_id(0).to(tl.int64)
    n, g = pid % N, pid // N
    particles += g * particles_g
    others += g * others_g
    row = tl.arange(0, ROWS).to(tl.int64)
    d = tl.arange(0, FIRST)
    rows = tl.where(row < MI, particles + row * particles_m, others + (row - MI) * others_m)
    own = tl.where(n < MI, particles + n * particles_m, others + (n - MI) * others_m)
    known = (row < n)[:, None] & (d < D)[None, :]
    first = tl.load(rows[:, None] + d[None, :], mask=known, other=0.0).to(ACC)
    own_first = _load_row(own, d, D, ACC)
    unequal = first * tl.sum(tl.abs(own_first), 0) != own_first[None, :] * tl.sum(tl.abs(first), 1)[:, None]
    alike = (row < n) & (tl.sum((unequal & known).to(tl.int32), 1) == 0)
    source = n
    for before in range(N - 1):
        m = n * 0 + before
        if (source == n) & (tl.sum((alike & (row == m)).to(tl.int32), 0) > 0):
            other = tl.where(m < MI, particles + m * particles_m, others + (m - MI) * others_m)
            source = tl.where(_equal(own, other, D, NORMALIZE, EPS, STEPS, BLOCK, ACC), m, n)
    for step in range(STEPS_K):
        k = step * BLOCK + tl.arange(0, BLOCK)
        value = tl.zeros([BLOCK], x.dtype.element_ty)
        if source == 0:
            for above in range(N - 1):
                value += tl.load(product + (n * 0 + above) * G * K + g * K + k, mask=k < K, other=0.0)
            value *= KAPPA
        else:
            value += tl.load(product + ((source - 1) * G + g) * K + k, mask=k < K, other=0.0)
        tl.store(x + (n * G + g) * K + k, value, mask=k < K)


@triton.jit
def _project_kernel(
    particles,  # [M, G, D]
    mixed,  # [M, G, D]
    inverse_norm,  # [M, G], or sums of squares [splits, M, G] when STAGE is "sums"
    along,  # [M, G], mixed_i s_i, or sums of mixed_i p_i [splits, M, G]
    gradient,  # [M, G, D]
    D, G, splits, particles_m, particles_g,
    M: tl.constexpr, STAGE: tl.constexpr, EPS: tl.constexpr, STEPS: tl.constexpr, LANES: tl.constexpr,
    V: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """(mixed - along s) / norm. A program walks along one row twice, or where D is split does one STAGE of it."""
    pid = tl.program_id(0).to(tl.int64)
    m, split, g = pid % M, pid // M % splits, pid // M // splits
    particles += m * particles_m + g * particles_g
    mixed += (m * G + g) * D
    first_step = split.to(tl.int32) * STEPS
    if STAGE == "rest":
        r = tl.load(inverse_norm + m * G + g)
        t = tl.load(along + m * G + g)
    else:
        squares = tl.zeros([LANES, V], ACC)
        products = tl.zeros([LANES, V], ACC)
        for step in range(STEPS):
            d = (first_step + step) * (LANES * V) + _columns(LANES, V)
            p = _load_row(particles, d, D, ACC)
            squares = tl.fma(p, p, squares)
            products = tl.fma(p, _load_row(mixed, d, D, ACC), products)
        r = tl.sum(tl.sum(squares, 1), 0)
        t = tl.sum(tl.sum(products, 1), 0)
        if STAGE == "sums":
            tl.store(inverse_norm + (split * M + m) * G + g, r)
            tl.store(along + (split * M + m) * G + g, t)
        else:
            r = _inverse_root(r + EPS)
            t *= r
    if STAGE != "sums":
        gradient += (m * G + g) * D
        for step in range(STEPS):
            d = (first_step + step) * (LANES * V) + _columns(LANES, V)
            s = _load_row(particles, d, D, ACC) * r
            tl.store(gradient + d, (_load_row(mixed, d, D, ACC) - t * s) * r, mask=d < D)
