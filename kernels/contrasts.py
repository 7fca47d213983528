"""Norms and Householder contrasts. Rows are the particles, then the others if there are any (MJ > 0)."""
# ruff: noqa: RUF005 (Triton does not know (*a, b))

import triton
import triton.language as tl

from .rows import _columns, _inverse_root, _load_row, _load_rows, _load_scalars, _multiple, _own_norms, _scale


@triton.jit
def _norms_kernel(
    rows,  # [M, G, D]
    norms,  # [splits, M, G], step norms_s from split to split
    unsound,  # [G], read when REPAIR: only samples that are unsound are written
    D, G, splits, rows_m, rows_g, norms_s,
    M: tl.constexpr, EPS: tl.constexpr, WHOLE: tl.constexpr, REPAIR: tl.constexpr, STEPS: tl.constexpr,
    LANES: tl.constexpr, V: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """1 / norm where one program sees the WHOLE row, else the sum of squares of its columns."""
    pid = tl.program_id(0).to(tl.int64)
    m, split, g = pid % M, pid // M % splits, pid // M // splits
    if REPAIR:  # noqa: SIM102 (a constant, so that nothing is read without it)
        if tl.load(unsound + g) == 0:
            return
    D, rows_m, rows_g = _multiple(D, V), _multiple(rows_m, V), _multiple(rows_g, V)
    rows += m * rows_m + g * rows_g
    squares = tl.zeros([LANES, V], ACC)
    first_step = split.to(tl.int32) * STEPS
    for step in range(STEPS):
        x = _load_row(rows, (first_step + step) * (LANES * V) + _columns(LANES, V), D, ACC)
        squares = tl.fma(x, x, squares)
    total = tl.sum(tl.sum(squares, 1), 0)
    if WHOLE:
        total = _inverse_root(total + EPS)
    tl.store(norms + split * norms_s + m * G + g, total)


@triton.jit
def _contrasts_kernel(
    particles,  # [MI, G, D]
    others,  # [MJ, G, D]
    inverse_norm,  # [N, G]; read when NORM is "given", written when it is "own"
    contrasts,  # [N - 1, G, D]; UNIT times them
    D, G, splits, particles_m, particles_g, others_m, others_g,
    MI: tl.constexpr, MJ: tl.constexpr, NORM: tl.constexpr, EPS: tl.constexpr, WEIGHT: tl.constexpr,
    UNIT: tl.constexpr, STEPS: tl.constexpr, LANES: tl.constexpr, V: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """A few rows: all of them stay in registers, and a program that walks along all of D can find their norms.

    u = s_0 + WEIGHT sum_n (s_n - s_0): from differences, so that what the rows share is gone before it is rounded.
    """
    N: tl.constexpr = MI + MJ
    pid = tl.program_id(0).to(tl.int64)
    g, split = pid // splits, pid % splits
    D, particles_m, particles_g = _multiple(D, V), _multiple(particles_m, V), _multiple(particles_g, V)
    particles += g * particles_g
    others += g * others_g
    first = g * 0  # 64 bits wide
    r = ()
    if NORM == "own":
        r = _own_norms(particles, particles_m, first, D, STEPS, MI, EPS, LANES, V, ACC)
        if MJ > 0:
            r = r + _own_norms(others, others_m, first, D, STEPS, MJ, EPS, LANES, V, ACC)
        for n in tl.static_range(N):
            tl.store(inverse_norm + (first + n) * G + g, r[n])
    elif NORM == "given":
        r = _load_scalars(inverse_norm + g, G, first, N, N)
    first_step = split.to(tl.int32) * STEPS
    for step in range(STEPS):
        d = (first_step + step) * (LANES * V) + _columns(LANES, V)
        s = _load_rows(particles, particles_m, first, MI, d, D, MI, ACC)
        if MJ > 0:
            s = s + _load_rows(others, others_m, first, MJ, d, D, MJ, ACC)
        if NORM != "unit":
            s = _scale(s, r, N)
        total = s[1] - s[0]
        for n in tl.static_range(2, N):
            total += s[n] - s[0]
        for n in tl.static_range(1, N):
            z = (s[n] - s[0]) - total * WEIGHT
            tl.store(contrasts + ((first + (n - 1)) * G + g) * D + d, z * UNIT, mask=d < D)


@triton.jit
def _differences(
    rows, stride, inverse_norm, G, s_0, first, d, D, M: tl.constexpr, BLOCK: tl.constexpr, ACC: tl.constexpr
):
    """s_n - s_0 of BLOCK rows."""
    s = _load_rows(rows, stride, first, M, d, D, BLOCK, ACC)
    r = _load_scalars(inverse_norm, G, first, M, BLOCK)
    differences = ()
    for k in tl.static_range(BLOCK):
        differences = differences + (s[k] * r[k] - s_0,)
    return differences


@triton.jit
def _sum_differences(
    total, rows, stride, inverse_norm, G, s_0, d, D, M: tl.constexpr, BLOCK: tl.constexpr, ACC: tl.constexpr
):
    for n in range(0, M, BLOCK):
        first = tl.full((), 0, tl.int64) + n
        differences = _differences(rows, stride, inverse_norm, G, s_0, first, d, D, M, BLOCK, ACC)
        for k in tl.static_range(BLOCK):
            total += differences[k] * tl.where(first + k < M, 1.0, 0.0)
    return total


@triton.jit
def _store_differences(
    contrasts, skip, u, rows, stride, inverse_norm, G, s_0, d, D,
    M: tl.constexpr, UNIT: tl.constexpr, BLOCK: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Rows n of `rows` less u + s_0 to rows skip + n of the contrasts, where there is one."""
    for n in range(0, M, BLOCK):
        first = tl.full((), 0, tl.int64) + n
        differences = _differences(rows, stride, inverse_norm, G, s_0, first, d, D, M, BLOCK, ACC)
        for k in tl.static_range(BLOCK):
            row = first + (k + skip)
            columns = tl.where(first + k < M, tl.where(row >= 0, D, 0), 0)
            tl.store(contrasts + row * G * D + d, (differences[k] - u) * UNIT, mask=d < columns)


@triton.jit
def _contrasts_blocks_kernel(
    particles,  # [MI, G, D]
    others,  # [MJ, G, D]
    inverse_norm,  # [N, G]
    contrasts,  # [N - 1, G, D]; UNIT times them
    D, G, tiles, particles_m, particles_g, others_m, others_g,
    MI: tl.constexpr, MJ: tl.constexpr, WEIGHT: tl.constexpr, UNIT: tl.constexpr, BLOCK: tl.constexpr,
    LANES: tl.constexpr, V: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Any number of rows: they pass through twice, BLOCK of them at a time."""
    pid = tl.program_id(0).to(tl.int64)
    g, tile = pid // tiles, pid % tiles
    d = tile.to(tl.int32) * (LANES * V) + _columns(LANES, V)
    particles += g * particles_g
    others += g * others_g
    r = inverse_norm + g
    z = contrasts + g * D
    s_0 = _load_row(particles, d, D, ACC) * tl.load(r)
    u = tl.zeros([LANES, V], ACC)
    u = _sum_differences(u, particles, particles_m, r, G, s_0, d, D, MI, BLOCK, ACC)
    if MJ > 0:
        u = _sum_differences(u, others, others_m, r + MI * G, G, s_0, d, D, MJ, BLOCK, ACC)
    u *= WEIGHT
    _store_differences(z, -1, u, particles, particles_m, r, G, s_0, d, D, MI, UNIT, BLOCK, ACC)
    if MJ > 0:
        _store_differences(z, MI - 1, u, others, others_m, r + MI * G, G, s_0, d, D, MJ, UNIT, BLOCK, ACC)
