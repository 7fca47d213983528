"""The gradient's rows: a program holds the rows of q of one sample on a few columns and mixes their differences."""
# ruff: noqa: RUF005 (Triton does not know (*a, b))

import triton
import triton.language as tl

from .rows import (
    _columns,
    _load_products,
    _load_row,
    _load_rows,
    _load_scalars,
    _multiple,
    _scale,
    _with_row_0,
    _zeros,
)
from .rule import _own_coefficients


@triton.jit
def _store_row(gradient, particles, r, projection, total, d, D, ACC: tl.constexpr):
    s = _load_row(particles, d, D, ACC) * r
    tl.store(gradient + d, (total - projection * s) * r, mask=d < D)


@triton.jit
def _add_row(total, c, q, q_j, COUNT: tl.constexpr):
    new = ()
    for k in tl.static_range(COUNT):
        new = new + (tl.fma(tl.broadcast_to(c[k], q_j.shape), q[k] - q_j, total[k]),)
    return new


@triton.jit
def _combine_kernel(
    particles,  # [M, G, D], read unless q is all that is mixed
    product,  # [M - 1, G, D], read when HAS_PRODUCT
    inverse_norm,  # [M, G]
    distances,  # [M, M, G], read when RULE
    alignments,  # [M, M, G], likewise
    exact,  # [M, G], float64, likewise
    parts,  # [M, G], float64, likewise
    value,  # [], written when RULE
    coefficients,  # [M, M, G], of any strides
    projection,  # [M, G]
    mixed,  # [M, G, D], read when HAS_MIXED
    gradient,  # [M, G, D]
    D, G, tiles, particles_m, particles_g, product_m, product_g, c_pair, c_g,
    M: tl.constexpr, HAS_PRODUCT: tl.constexpr, HAS_MIXED: tl.constexpr, KAPPA: tl.constexpr, UNIT: tl.constexpr,
    RULE: tl.constexpr, STEPS: tl.constexpr, BLOCK: tl.constexpr, PROJECT: tl.constexpr, LANES: tl.constexpr,
    V: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """A few rows: all stay in registers. UNIT is a factor of the sum; by the RULE, coefficients are made here."""
    pid = tl.program_id(0).to(tl.int64)
    g = pid // tiles
    D, particles_m, particles_g = _multiple(D, V), _multiple(particles_m, V), _multiple(particles_g, V)
    product_m, product_g = _multiple(product_m, V), _multiple(product_g, V)
    d = (pid % tiles).to(tl.int32) * (LANES * V) + _columns(LANES, V)
    particles += g * particles_g
    first = g * 0  # 64 bits wide
    if RULE:  # before rows take the registers that other programs need
        _own_coefficients(distances, alignments, exact, parts, value, coefficients, projection, g, G, M, STEPS, BLOCK)
    if HAS_PRODUCT:
        q = _with_row_0(_load_rows(product + g * product_g, product_m, first, M, d, D, M - 1, ACC), KAPPA, M - 1)
    elif UNIT != 0:
        r = _load_scalars(inverse_norm + g, G, first, M, M)
        q = _scale(_load_rows(particles, particles_m, first, M, d, D, M, ACC), r, M)
    for i in tl.static_range(M):
        row = (first + i) * G + g
        total = tl.zeros([LANES, V], ACC)
        if HAS_MIXED:
            total = _load_row(mixed + row * D, d, D, ACC)
        for j in tl.static_range(M):
            if j != i and UNIT != 0:
                c = tl.load(coefficients + (first + (i * M + j)) * c_pair + g * c_g) * UNIT
                total = tl.fma(tl.broadcast_to(c, total.shape), q[i] - q[j], total)
        if PROJECT:
            r_i = tl.load(inverse_norm + row)
            t = tl.load(projection + row)
            _store_row(gradient + row * D, particles + (first + i) * particles_m, r_i, t, total, d, D, ACC)
        else:
            tl.store(gradient + row * D + d, total, mask=d < D)


@triton.jit
def _combine_blocks_kernel(
    particles,  # [MI, G, D]
    others,  # [MJ, G, D]; the particles when SAME
    product,  # [N - 1, G, D], read when HAS_PRODUCT
    product_sum,  # [G, D]: its sum over rows
    inverse_norm,  # [N, G]
    coefficients,  # [MI, MJ, G]
    projection,  # [MI, G]
    mixed,  # [MI, G, D], read when HAS_MIXED
    gradient,  # [MI, G, D]
    D, G, tiles, particles_m, particles_g, others_m, others_g, product_m, product_g,
    MI: tl.constexpr, MJ: tl.constexpr, SAME: tl.constexpr, HAS_PRODUCT: tl.constexpr, HAS_MIXED: tl.constexpr,
    KAPPA: tl.constexpr, BLOCK_I: tl.constexpr, LANES: tl.constexpr, V: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Any number of rows: a program has BLOCK_I of them and takes the rows j one after another."""
    BLOCKS: tl.constexpr = (MI + BLOCK_I - 1) // BLOCK_I
    SKIP: tl.constexpr = 0 if SAME else MI  # rows of q and of the norms before those of j
    pid = tl.program_id(0).to(tl.int64)
    i, tile, g = pid % BLOCKS * BLOCK_I, pid // BLOCKS % tiles, pid // BLOCKS // tiles
    d = tile.to(tl.int32) * (LANES * V) + _columns(LANES, V)
    particles += g * particles_g
    others += g * others_g
    product += g * product_g
    product_sum += g * D
    r = _load_scalars(inverse_norm + g, G, i, MI, BLOCK_I)
    if HAS_PRODUCT:
        q = _load_products(product, product_sum, product_m, i, MI, d, D, KAPPA, BLOCK_I, ACC)
    else:
        q = _scale(_load_rows(particles, particles_m, i, MI, d, D, BLOCK_I, ACC), r, BLOCK_I)
    if HAS_MIXED:
        total = _load_rows(mixed + g * D, (g * 0 + G) * D, i, MI, d, D, BLOCK_I, ACC)
    else:
        total = _zeros(q[0], BLOCK_I)
    coefficients += g
    if SAME and HAS_PRODUCT:  # q_0 is not among the product's rows
        c = _load_scalars(coefficients, MJ * G, i, MI, BLOCK_I)
        total = _add_row(total, c, q, _load_row(product_sum, d, D, ACC) * KAPPA, BLOCK_I)
    for step in range(1 if SAME and HAS_PRODUCT else 0, MJ):
        j = g * 0 + step
        if HAS_PRODUCT:
            q_j = _load_row(product + (SKIP + j - 1) * product_m, d, D, ACC)
        else:
            q_j = _load_row(others + j * others_m, d, D, ACC) * tl.load(inverse_norm + (SKIP + j) * G + g)
        c = _load_scalars(coefficients + j * G, MJ * G, i, MI, BLOCK_I)
        total = _add_row(total, c, q, q_j, BLOCK_I)
    t = _load_scalars(projection + g, G, i, MI, BLOCK_I)
    for k in tl.static_range(BLOCK_I):
        columns = tl.where(i + k < MI, D, 0)
        row = gradient + ((i + k) * G + g) * D
        _store_row(row, particles + (i + k) * particles_m, r[k], t[k], total[k], d, columns, ACC)
