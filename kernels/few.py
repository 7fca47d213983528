"""The pair distances of one sample where a program holds all of its rows: norms, contrasts and medians on the way.

A thread keeps one sum for every pair and walks along D: nothing passes between threads before the end. As C is
symmetric, 2 (q_i - q_j) s_i = d_ij + e_i - e_j with e_i = (q_i - q_0) (s_i + s_0): M - 1 sums more give all
alignments, and from differences.
"""
# ruff: noqa: RUF005 (Triton does not know (*a, b))

import triton
import triton.language as tl

from .pairs import _store_pair, _sum_16
from .rows import (
    _columns,
    _load_row,
    _load_rows,
    _load_scalars,
    _multiple,
    _own_norms,
    _scale,
    _split,
    _with_row_0,
    _zeros,
)
from .rule import _medians


@triton.jit
def _add_pairs(distance, excess, q, s, shift, M: tl.constexpr):
    """The sums of all pairs i < j, row after row, and those of e, one column further; s lacks the shift, if any."""
    new_distance = ()
    new_excess = ()
    for i in tl.static_range(M):
        if i > 0:
            both = s[i] + s[0]
            if len(shift) > 0:
                both += 2 * shift[0]
            new_excess = new_excess + (tl.fma(q[i] - q[0], both, excess[i - 1]),)
        for j in tl.static_range(i + 1, M):
            new_distance = new_distance + (tl.fma(q[i] - q[j], s[i] - s[j], distance[len(new_distance)]),)
    return new_distance, new_excess


@triton.jit
def _one_of(values, index):
    """values [16] at index [16]."""
    chosen = index[:, None] == tl.arange(0, 16)[None, :]
    return tl.sum(tl.where(chosen, values[None, :], 0.0), 1)


@triton.jit
def _store_all(
    distances, alignments, tail_distances, tail_alignments, distance, excess, square, G,
    M: tl.constexpr, UNIT: tl.constexpr, TAIL: tl.constexpr, HAS_TAIL: tl.constexpr, WHOLE: tl.constexpr,
    ACC: tl.constexpr,
):  # fmt: skip
    """UNIT times the sums; plus TAIL times the tail's, 0 where these are: equal rows have no distance.

    The square, if any, is stored as row 0's alignment with itself, which is 0; in row 0's place among the excesses,
    it takes no reduction of its own.
    """
    PAIRS: tl.constexpr = M * (M - 1) // 2
    row = tl.arange(0, 16)
    zero = tl.zeros([16], ACC)
    sums = _sum_16((square if len(square) > 0 else _zeros(excess[0], 1)) + excess, 0, M)
    e = tl.where((row > 0) & (row < M), sums, 0.0)
    for part in tl.static_range((PAIRS + 15) // 16):
        pair = part * 16 + row
        i = tl.zeros([16], tl.int32)
        for k in tl.static_range(1, M - 1):
            i += (pair >= k * (2 * M - k - 1) // 2).to(tl.int32)
        j = pair - i * (2 * M - i - 1) // 2 + i + 1
        keep = pair < PAIRS
        d = _sum_16(distance, part * 16, PAIRS) * UNIT
        a = (d + (_one_of(e, i) - _one_of(e, j)) * UNIT) * 0.5
        at = (i * M + j).to(tl.int64) * G
        if HAS_TAIL:
            tail = tl.load(tail_distances + at, mask=keep, other=0.0)
            d = tl.where(tail == 0, 0.0, d + TAIL * tail)
            a = tl.where(tail == 0, 0.0, a + TAIL * tl.load(tail_alignments + at, mask=keep, other=0.0))
        i = i.to(tl.int64)
        # (q_j - q_i) s_j, for the difference of the two alignments is the distance
        _store_pair(distances, alignments, j, i, keep, d, d - a, G, M, WHOLE)
        _store_pair(distances, alignments, i, j, keep, d, a, G, M, WHOLE)
    own = tl.where(row == 0, sums, 0.0)
    _store_pair(distances, alignments, row, row.to(tl.int64), row < M, zero, own, G, M, WHOLE)


@triton.jit
def _store_contrasts(contrasts, s, size, d, D, M: tl.constexpr, WEIGHT: tl.constexpr, UNIT: tl.constexpr):
    """UNIT times s_n - u, n > 0, then UNIT times u itself; as in contrasts.py."""
    total = s[1] - s[0]
    for n in tl.static_range(2, M):
        total += s[n] - s[0]
    for n in tl.static_range(1, M):
        tl.store(contrasts + (n - 1) * size + d, ((s[n] - s[0]) - total * WEIGHT) * UNIT, mask=d < D)
    tl.store(contrasts + (M - 1) * size + d, (s[0] + total * WEIGHT) * UNIT, mask=d < D)


@triton.jit
def _load_columns(
    particles, product, contrasts, r, first, d, D, size, particles_m, product_m,
    M: tl.constexpr, SOURCE: tl.constexpr, NORM: tl.constexpr, CONTRASTS: tl.constexpr, WEIGHT: tl.constexpr,
    CONTRASTS_UNIT: tl.constexpr, V: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """In V parts columns of the rows, of q without row 0, and of what coordinates lack; () for what is not read."""
    rows = ()
    w = ()
    shift = ()
    if SOURCE != "particles":
        w = _split(_load_rows(product, product_m, first, M, d, D, M - 1, ACC), M - 1, V)
    if SOURCE == "coordinates":
        shift = _split((_load_row(product + (first + (M - 1)) * product_m, d, D, ACC),), 1, V)
    else:
        rows = _load_rows(particles, particles_m, first, M, d, D, M, ACC)
        if CONTRASTS:
            if NORM != "unit":
                rows = _scale(rows, r, M)
            _store_contrasts(contrasts, rows, size, d, D, M, WEIGHT, CONTRASTS_UNIT)
        rows = _split(rows, M, V)
    return rows, w, shift


@triton.jit
def _store_rule(distances, bandwidth, exact, parts, G, M: tl.constexpr, LOG_COUNT: tl.constexpr, FLOOR: tl.constexpr):
    """Medians of the sample's distances, which this program has stored, and sums of its kernel values."""
    tl.debug_barrier()  # other threads have stored them
    j, i = tl.arange(0, 16)[:, None], tl.arange(0, 16)[None, :]
    inside = (i < M) & (j < M)
    d = tl.load(distances + (i * M + j).to(tl.int64) * G, mask=inside, other=float("inf"))
    h, kernel = _medians(d, inside, M, LOG_COUNT, FLOOR)
    row = tl.arange(0, 16).to(tl.int64)
    tl.store(bandwidth + row * G, h, mask=row < M)
    tl.store(exact + row * G, h, mask=row < M)
    tl.store(parts + row * G, tl.sum(kernel, 0), mask=row < M)


@triton.jit
def _pair_distances_kernel(
    particles,  # [M, G, D], read unless SOURCE is "coordinates"
    product,  # q, read unless SOURCE is "particles": [M - 1, G, D]; of "coordinates" and in row M - 1 what all lack
    inverse_norm,  # [M, G]; read when NORM is "given" or "provisional", written when it is "own"
    tail_distances,  # [M, M, G], read when HAS_TAIL
    tail_alignments,  # [M, M, G], likewise
    distances,  # [splits, M, M, G]
    alignments,  # [splits, M, M, G]
    contrasts,  # [M, G, D], written when CONTRASTS
    bandwidth,  # [M, G], written when RULE
    exact,  # [M, G], float64, likewise
    parts,  # [M, G], float64, likewise: sums of kernel values
    unsound,  # [G], read when REPAIR: only samples that are unsound are written
    D, G, splits, particles_m, particles_g, product_m, product_g,
    M: tl.constexpr, SOURCE: tl.constexpr, NORM: tl.constexpr, EPS: tl.constexpr, KAPPA: tl.constexpr,
    UNIT: tl.constexpr, TAIL: tl.constexpr, HAS_TAIL: tl.constexpr, CONTRASTS: tl.constexpr, WEIGHT: tl.constexpr,
    CONTRASTS_UNIT: tl.constexpr, RULE: tl.constexpr, LOG_COUNT: tl.constexpr, FLOOR: tl.constexpr,
    WHOLE: tl.constexpr, REPAIR: tl.constexpr, STEPS: tl.constexpr, LANES: tl.constexpr, V: tl.constexpr,
    ACC: tl.constexpr,
):  # fmt: skip
    """All pairs of a few rows, two at least: a program has every row, so it can find norms and row 0 of q.

    SOURCE: q = s are the "particles"; q comes from the "product"; q = s are "coordinates", and come from it.
    NORM "provisional": |s_0|^2 is summed too.
    """
    pid = tl.program_id(0).to(tl.int64)
    g, split = pid // splits, pid % splits
    if REPAIR:  # noqa: SIM102 (a constant, so that nothing is read without it)
        if tl.load(unsound + g) == 0:
            return
    D, particles_m, particles_g = _multiple(D, V), _multiple(particles_m, V), _multiple(particles_g, V)
    product_m, product_g = _multiple(product_m, V), _multiple(product_g, V)
    size = (g * 0 + G) * D
    particles += g * particles_g
    product += g * product_g
    contrasts += g * D
    inverse_norm += g
    distances += split * (M * M) * G + g
    alignments += split * (M * M) * G + g
    first = g * 0  # 64 bits wide
    r = ()
    if NORM == "own":
        r = _own_norms(particles, particles_m, first, D, STEPS, M, EPS, LANES, V, ACC)
        for k in tl.static_range(M):
            tl.store(inverse_norm + (first + k) * G, r[k])
    elif NORM != "unit":
        r = _load_scalars(inverse_norm, G, first, M, M)

    distance = _zeros(tl.zeros([LANES], ACC), M * (M - 1) // 2)
    excess = _zeros(tl.zeros([LANES], ACC), M - 1)
    square = _zeros(tl.zeros([LANES], ACC), 1 if NORM == "provisional" else 0)
    first_step = split.to(tl.int32) * STEPS
    for step in range(STEPS):
        d = (first_step + step) * (LANES * V) + _columns(LANES, V)
        p, w, shift = _load_columns(
            particles, product, contrasts, r, first, d, D, size, particles_m, product_m,
            M, SOURCE, NORM, CONTRASTS, WEIGHT, CONTRASTS_UNIT, V, ACC,
        )  # fmt: skip
        for v in tl.static_range(V):
            u = ()
            if SOURCE == "coordinates":
                s = _with_row_0(w[v], KAPPA, M - 1)
                q = s
                u = shift[v]
            else:
                s = p[v]
                if NORM != "unit" and not CONTRASTS:
                    s = _scale(s, r, M)
                q = s
                if SOURCE == "product":
                    q = _with_row_0(w[v], KAPPA, M - 1)
            if NORM == "provisional":
                square = (tl.fma(s[0], s[0], square[0]),)
            distance, excess = _add_pairs(distance, excess, q, s, u, M)

    _store_all(
        distances, alignments, tail_distances + g, tail_alignments + g, distance, excess, square, G,
        M, UNIT, TAIL, HAS_TAIL, WHOLE, ACC,
    )  # fmt: skip
    if RULE:
        _store_rule(distances, bandwidth + g, exact + g, parts + g, G, M, LOG_COUNT, FLOOR)
