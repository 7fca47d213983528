"""The pair distances of one sample's rows, each pair once, from differences.

A thread keeps one sum for every pair of its block and walks along D: nothing passes between threads before the
end.
"""
# ruff: noqa: RUF005 (Triton does not know (*a, b))

import triton
import triton.language as tl

from .rows import _columns, _load_products, _load_rows, _load_scalars, _scale, _split, _zeros


@triton.jit
def _add_pairs(distance, alignment, q_i, s_i, q_j, s_j, BLOCK_I: tl.constexpr, BLOCK_J: tl.constexpr):
    """The sums of all pairs, row after row, one column further."""
    new_distance = ()
    new_alignment = ()
    for i in tl.static_range(BLOCK_I):
        for j in tl.static_range(BLOCK_J):
            delta = q_i[i] - q_j[j]
            new_alignment = new_alignment + (tl.fma(delta, s_i[i], alignment[len(new_alignment)]),)
            new_distance = new_distance + (tl.fma(delta, s_i[i] - s_j[j], distance[len(new_distance)]),)
    return new_distance, new_alignment


@triton.jit
def _sum_16(sums, FIRST: tl.constexpr, COUNT: tl.constexpr):
    """Sums FIRST to FIRST + 16 over their lanes in one reduction -> [16], zeros from COUNT on."""
    parts = ()
    for k in tl.static_range(16):
        parts = parts + ((sums[FIRST + k] if FIRST + k < COUNT else tl.zeros_like(sums[0])),)
    for level in tl.static_range(4):
        joined = ()
        for k in tl.static_range(8 >> level):
            joined = joined + (tl.join(parts[k], parts[k + (8 >> level)]),)
        parts = joined
    return tl.sum(tl.reshape(parts[0], [sums[0].shape[0], 16]), 0)


@triton.jit
def _store_pair(distances, alignments, i, j, keep, distance, alignment, G, MJ: tl.constexpr, WHOLE: tl.constexpr):
    if WHOLE:
        distance = tl.where(distance < 0, 0.0, distance)  # unlike a maximum, this keeps NaN
    tl.store(distances + (i * MJ + j) * G, distance, mask=keep)
    tl.store(alignments + (i * MJ + j) * G, alignment, mask=keep)


@triton.jit
def _store_pairs(
    distances, alignments, distance, alignment, first_i, first_j, G,
    MI: tl.constexpr, MJ: tl.constexpr, SAME: tl.constexpr, WHOLE: tl.constexpr, BLOCK_I: tl.constexpr,
    BLOCK_J: tl.constexpr,
):  # fmt: skip
    PAIRS: tl.constexpr = BLOCK_I * BLOCK_J
    for part in tl.static_range((PAIRS + 15) // 16):
        pair = part * 16 + tl.arange(0, 16)
        i = first_i + pair // BLOCK_J
        j = first_j + pair % BLOCK_J
        keep = (pair < PAIRS) & (i < MI) & (j < MJ)
        d = _sum_16(distance, part * 16, PAIRS)
        a = _sum_16(alignment, part * 16, PAIRS)
        if SAME:
            keep = keep & (i <= j)
            d = tl.where(i == j, 0.0, d)
            a = tl.where(i == j, 0.0, a)
            # (q_j - q_i) s_j, for the difference of the two alignments is the distance
            _store_pair(distances, alignments, j, i, keep & (i < j), d, d - a, G, MJ, WHOLE)
        _store_pair(distances, alignments, i, j, keep, d, a, G, MJ, WHOLE)


@triton.jit
def _pair_blocks_kernel(
    particles,  # [MI, G, D]
    others,  # [MJ, G, D]; the particles when SAME
    product,  # [N - 1, G, D], read when HAS_PRODUCT
    product_sum,  # [G, D]: its sum over rows
    inverse_norm,  # [N, G], read when SCALED
    distances,  # [splits, MI, MJ, G]
    alignments,  # [splits, MI, MJ, G]
    D, G, splits, particles_m, particles_g, others_m, others_g, product_m, product_g,
    MI: tl.constexpr, MJ: tl.constexpr, SAME: tl.constexpr, HAS_PRODUCT: tl.constexpr, SCALED: tl.constexpr,
    KAPPA: tl.constexpr, WHOLE: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_J: tl.constexpr,
    STEPS: tl.constexpr, LANES: tl.constexpr, V: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Any number of rows: a program has a block of BLOCK_I against BLOCK_J."""
    BLOCKS_I: tl.constexpr = (MI + BLOCK_I - 1) // BLOCK_I
    BLOCKS: tl.constexpr = BLOCKS_I * ((MJ + BLOCK_J - 1) // BLOCK_J)
    SKIP: tl.constexpr = 0 if SAME else MI  # rows of q and of the norms before those of j
    pid = tl.program_id(0).to(tl.int64)
    block, split, g = pid % BLOCKS, pid // BLOCKS % splits, pid // BLOCKS // splits
    i = block % BLOCKS_I * BLOCK_I
    j = block // BLOCKS_I * BLOCK_J
    if SAME and i > j:
        return
    particles += g * particles_g
    others += g * others_g
    product += g * product_g
    product_sum += g * D
    r_i = ()
    r_j = ()
    if SCALED:
        r_i = _load_scalars(inverse_norm + g, G, i, MI, BLOCK_I)
        r_j = _load_scalars(inverse_norm + g, G, SKIP + j, SKIP + MJ, BLOCK_J)

    distance = _zeros(tl.zeros([LANES], ACC), BLOCK_I * BLOCK_J)
    alignment = _zeros(tl.zeros([LANES], ACC), BLOCK_I * BLOCK_J)
    first_step = split.to(tl.int32) * STEPS
    for step in range(STEPS):
        d = (first_step + step) * (LANES * V) + _columns(LANES, V)
        p_i = _split(_load_rows(particles, particles_m, i, MI, d, D, BLOCK_I, ACC), BLOCK_I, V)
        p_j = _split(_load_rows(others, others_m, j, MJ, d, D, BLOCK_J, ACC), BLOCK_J, V)
        w_i = ()
        w_j = ()
        if HAS_PRODUCT:
            w_i = _load_products(product, product_sum, product_m, i, MI, d, D, KAPPA, BLOCK_I, ACC)
            w_j = _load_products(product, product_sum, product_m, SKIP + j, SKIP + MJ, d, D, KAPPA, BLOCK_J, ACC)
            w_i = _split(w_i, BLOCK_I, V)
            w_j = _split(w_j, BLOCK_J, V)
        for v in tl.static_range(V):
            s_i = p_i[v]
            s_j = p_j[v]
            if SCALED:
                s_i = _scale(s_i, r_i, BLOCK_I)
                s_j = _scale(s_j, r_j, BLOCK_J)
            q_i = s_i
            q_j = s_j
            if HAS_PRODUCT:
                q_i = w_i[v]
                q_j = w_j[v]
            distance, alignment = _add_pairs(distance, alignment, q_i, s_i, q_j, s_j, BLOCK_I, BLOCK_J)

    distances += split * (MI * MJ) * G + g
    alignments += split * (MI * MJ) * G + g
    _store_pairs(distances, alignments, distance, alignment, i, j, G, MI, MJ, SAME, WHOLE, BLOCK_I, BLOCK_J)
