"""The pair distances of one sample's rows, each pair once, from differences.

A thread keeps one sum for every pair of its block and walks along D, so nothing passes between threads before
the end. Rows and sums are tuples of tensors [LANES], one number in a thread: tuples may have any length, where
a tensor's sides are powers of two. Contraction is off and written out where welcome, as in rows.py.
"""
# ruff: noqa: RUF005 (Triton does not know (*a, b))

import triton
import triton.language as tl

from .rows import _inverse_root


@triton.jit
def _zeros(COUNT: tl.constexpr, LANES: tl.constexpr, ACC: tl.constexpr):
    sums = ()
    for _ in tl.static_range(COUNT):
        sums = sums + (tl.zeros([LANES], ACC),)
    return sums


@triton.jit
def _load(pointer, d, mask, V: tl.constexpr, ACC: tl.constexpr):
    """Columns d [LANES, V] of one row, one vector load in a thread -> V tensors [LANES]."""
    x = tl.load(pointer + d, mask=mask, other=0.0).to(ACC)
    if V == 1:
        return (tl.reshape(x, [x.shape[0]]),)
    elif V == 2:
        even, odd = tl.split(x)
        return (even, odd)
    else:
        even, odd = tl.split(tl.reshape(x, [x.shape[0], 2, 2]))
        a, c = tl.split(even)
        b, e = tl.split(odd)
        return (a, c, b, e)


@triton.jit
def _load_rows(base, stride, first, limit, d, D, COUNT: tl.constexpr, V: tl.constexpr, ACC: tl.constexpr):
    """COUNT rows from the first on, zeros from limit on -> COUNT times V tensors [LANES]."""
    rows = ()
    for k in tl.static_range(COUNT):
        columns = tl.where(first + k < limit, D, 0)
        rows = rows + (_load(base + (first + k) * stride, d, d < columns, V, ACC),)
    return rows


@triton.jit
def _load_products(
    product, product_sum, stride, first, limit, d, D,
    COUNT: tl.constexpr, KAPPA: tl.constexpr, V: tl.constexpr, ACC: tl.constexpr,
):
    """The same for q: its row n is the product's row n - 1, its row 0 KAPPA times the product's sum."""
    row = _load(product + (first - 1) * stride, d, d < tl.where(first > 0, D, 0), V, ACC)
    row_0 = _load(product_sum, d, d < tl.where(first > 0, 0, D), V, ACC)
    head = ()
    for v in tl.static_range(V):
        head = head + (row[v] + row_0[v] * KAPPA,)
    return (head,) + _load_rows(product, stride, first, limit - 1, d, D, COUNT - 1, V, ACC)


@triton.jit
def _slice(rows, v: tl.constexpr, COUNT: tl.constexpr):
    out = ()
    for k in tl.static_range(COUNT):
        out = out + (rows[k][v],)
    return out


@triton.jit
def _scale(rows, r, COUNT: tl.constexpr):
    out = ()
    for k in tl.static_range(COUNT):
        out = out + (rows[k] * r[k],)
    return out


@triton.jit
def _first_row(products, KAPPA: tl.constexpr, COUNT: tl.constexpr):
    total = products[0]
    for k in tl.static_range(1, COUNT):
        total += products[k]
    return total * KAPPA


@triton.jit
def _given_norms(inverse_norm, first, limit, G, COUNT: tl.constexpr):
    r = ()
    for k in tl.static_range(COUNT):
        r = r + (tl.load(inverse_norm + (first + k) * G, mask=first + k < limit, other=0.0),)
    return r


@triton.jit
def _own_norms(
    base, stride, first, column, D,
    COUNT: tl.constexpr, EPS: tl.constexpr, LANES: tl.constexpr, V: tl.constexpr, ACC: tl.constexpr,
):
    """1 / norm of COUNT whole rows -> COUNT scalars."""
    squares = _zeros(COUNT, LANES, ACC)
    for start in range(0, D, LANES * V):
        rows = _load_rows(base, stride, first, first + COUNT, start + column, D, COUNT, V, ACC)
        for v in tl.static_range(V):
            new = ()
            for k in tl.static_range(COUNT):
                new = new + (tl.fma(rows[k][v], rows[k][v], squares[k]),)
            squares = new
    r = ()
    for k in tl.static_range(COUNT):
        r = r + (_inverse_root(tl.sum(squares[k], 0) + EPS),)
    return r


@triton.jit
def _add_pairs(
    distance, alignment, q_i, s_i, q_j, s_j,
    BLOCK_I: tl.constexpr, BLOCK_J: tl.constexpr, TRIANGLE: tl.constexpr,
):
    """The sums of all pairs (i < j only in a triangle), row after row, one column further."""
    new_distance = ()
    new_alignment = ()
    for i in tl.static_range(BLOCK_I):
        for j in tl.static_range(i + 1 if TRIANGLE else 0, BLOCK_J):
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
def _store_pair(
    out, i, j, keep, distance, alignment, G, MI: tl.constexpr, MJ: tl.constexpr, WHOLE: tl.constexpr
):
    if WHOLE:
        distance = tl.where(distance < 0, 0.0, distance)  # unlike a maximum, this keeps NaN
    tl.store(out + (i * MJ + j) * G, distance, mask=keep)
    tl.store(out + (MI * MJ + i * MJ + j) * G, alignment, mask=keep)


@triton.jit
def _store_pairs(
    out, distance, alignment, first_i, first_j, G, MI: tl.constexpr, MJ: tl.constexpr, SAME: tl.constexpr,
    WHOLE: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_J: tl.constexpr, TRIANGLE: tl.constexpr,
):
    PAIRS: tl.constexpr = BLOCK_I * (BLOCK_I - 1) // 2 if TRIANGLE else BLOCK_I * BLOCK_J
    for part in tl.static_range((PAIRS + 15) // 16):
        pair = part * 16 + tl.arange(0, 16)
        if TRIANGLE:
            i = tl.zeros([16], tl.int32)
            for k in tl.static_range(1, BLOCK_I - 1):
                i += (pair >= k * (2 * BLOCK_I - k - 1) // 2).to(tl.int32)
            j = pair - i * (2 * BLOCK_I - i - 1) // 2 + i + 1
        else:
            i = pair // BLOCK_J
            j = pair % BLOCK_J
        i += first_i
        j += first_j
        keep = (pair < PAIRS) & (i < MI) & (j < MJ)
        d = _sum_16(distance, part * 16, PAIRS)
        a = _sum_16(alignment, part * 16, PAIRS)
        if SAME:
            keep = keep & (i <= j)
            d = tl.where(i == j, 0.0, d)
            a = tl.where(i == j, 0.0, a)
            # (q_j - q_i) s_j, for the difference of the two alignments is the distance
            _store_pair(out, j, i, keep & (i < j), d, d - a, G, MI, MJ, WHOLE)
        _store_pair(out, i, j, keep, d, a, G, MI, MJ, WHOLE)


@triton.jit
def _pair_distances_kernel(
    particles,  # [M, G, D]
    product,  # [M - 1, G, D], read when HAS_PRODUCT
    inverse_norm,  # [M, G]; read when NORM is "given", written when it is "own"
    out,  # [splits, 2, M, M, G]: distance, alignment
    D, G, splits, chunk, particles_m, particles_g, product_m, product_g,
    M: tl.constexpr, HAS_PRODUCT: tl.constexpr, NORM: tl.constexpr, EPS: tl.constexpr, KAPPA: tl.constexpr,
    WHOLE: tl.constexpr, LANES: tl.constexpr, V: tl.constexpr, ACC: tl.constexpr,
):
    """All pairs of a few rows, two at least: a program has every row, so it can find norms and row 0 of q."""
    pid = tl.program_id(0).to(tl.int64)
    g, split = pid // splits, pid % splits
    particles += g * particles_g
    product += g * product_g
    inverse_norm += g
    out += split * (2 * M * M) * G + g
    row = g * 0  # 64 bits wide
    column = tl.arange(0, LANES)[:, None] * V + tl.arange(0, V)[None, :]
    r = ()
    if NORM == "own":
        r = _own_norms(particles, particles_m, row, column, D, M, EPS, LANES, V, ACC)
        for k in tl.static_range(M):
            tl.store(inverse_norm + k * G, r[k])
    elif NORM == "given":
        r = _given_norms(inverse_norm, row, M, G, M)

    distance = _zeros(M * (M - 1) // 2, LANES, ACC)
    alignment = _zeros(M * (M - 1) // 2, LANES, ACC)
    lo = split.to(tl.int32) * chunk
    for start in range(lo, tl.minimum(lo + chunk, D), LANES * V):
        d = start + column
        p = _load_rows(particles, particles_m, row, M, d, D, M, V, ACC)
        if HAS_PRODUCT:
            w = _load_rows(product, product_m, row, M, d, D, M - 1, V, ACC)
        for v in tl.static_range(V):
            s = _slice(p, v, M)
            if NORM != "unit":
                s = _scale(s, r, M)
            q = s
            if HAS_PRODUCT:
                q = _slice(w, v, M - 1)
                q = (_first_row(q, KAPPA, M - 1),) + q
            distance, alignment = _add_pairs(distance, alignment, q, s, q, s, M, M, True)

    _store_pairs(out, distance, alignment, row, row, G, M, M, True, WHOLE, M, M, True)
    i = tl.arange(0, triton.next_power_of_2(M))
    zero = tl.zeros([triton.next_power_of_2(M)], ACC)
    _store_pair(out, i, i, i < M, zero, zero, G, M, M, WHOLE)


@triton.jit
def _pair_blocks_kernel(
    particles,  # [MI, G, D]
    others,  # [MJ, G, D]; the particles when SAME
    product,  # [N - 1, G, D], read when HAS_PRODUCT
    product_sum,  # [G, D]: its sum over rows
    inverse_norm,  # [N, G], read when SCALED
    out,  # [splits, 2, MI, MJ, G]: distance, alignment
    D, G, splits, chunk, particles_m, particles_g, others_m, others_g, product_m, product_g,
    MI: tl.constexpr, MJ: tl.constexpr, SAME: tl.constexpr, HAS_PRODUCT: tl.constexpr, SCALED: tl.constexpr,
    KAPPA: tl.constexpr, WHOLE: tl.constexpr,
    BLOCK_I: tl.constexpr, BLOCK_J: tl.constexpr, LANES: tl.constexpr, V: tl.constexpr, ACC: tl.constexpr,
):
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
    column = tl.arange(0, LANES)[:, None] * V + tl.arange(0, V)[None, :]
    r_i = ()
    r_j = ()
    if SCALED:
        r_i = _given_norms(inverse_norm + g, i, MI, G, BLOCK_I)
        r_j = _given_norms(inverse_norm + g, SKIP + j, SKIP + MJ, G, BLOCK_J)

    distance = _zeros(BLOCK_I * BLOCK_J, LANES, ACC)
    alignment = _zeros(BLOCK_I * BLOCK_J, LANES, ACC)
    lo = split.to(tl.int32) * chunk
    for start in range(lo, tl.minimum(lo + chunk, D), LANES * V):
        d = start + column
        p_i = _load_rows(particles, particles_m, i, MI, d, D, BLOCK_I, V, ACC)
        p_j = _load_rows(others, others_m, j, MJ, d, D, BLOCK_J, V, ACC)
        if HAS_PRODUCT:
            w_i = _load_products(product, product_sum, product_m, i, MI, d, D, BLOCK_I, KAPPA, V, ACC)
            w_j = _load_products(
                product, product_sum, product_m, SKIP + j, SKIP + MJ, d, D, BLOCK_J, KAPPA, V, ACC
            )
        for v in tl.static_range(V):
            s_i = _slice(p_i, v, BLOCK_I)
            s_j = _slice(p_j, v, BLOCK_J)
            if SCALED:
                s_i = _scale(s_i, r_i, BLOCK_I)
                s_j = _scale(s_j, r_j, BLOCK_J)
            q_i = s_i
            q_j = s_j
            if HAS_PRODUCT:
                q_i = _slice(w_i, v, BLOCK_I)
                q_j = _slice(w_j, v, BLOCK_J)
            distance, alignment = _add_pairs(
                distance, alignment, q_i, s_i, q_j, s_j, BLOCK_I, BLOCK_J, False
            )

    _store_pairs(
        out + split * (2 * MI * MJ) * G + g, distance, alignment, i, j, G, MI, MJ, SAME, WHOLE,
        BLOCK_I, BLOCK_J, False,
    )
