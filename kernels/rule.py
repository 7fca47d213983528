"""The median rule: from distances to the value and the mixing coefficients. Two launches, between them M sums.

In float64, like forde_fast/rule.py: there are few numbers. To it the distances [MI, MJ, G] are a matrix of MI rows
and C = MJ G columns: every column has its own median, every row its own sum. Sums run in a fixed order.
"""

import triton
import triton.language as tl


@triton.jit
def _medians(d, inside, MI: tl.constexpr, LOG_COUNT: tl.constexpr, FLOOR: tl.constexpr):
    """d [columns, rows], infinity where not `inside` -> h [columns]; exp(-d / h) [columns, rows], 0 there."""
    row = tl.arange(0, d.shape[1])
    ordered = tl.sort(d, 1).to(tl.float64)
    lower = tl.sum(tl.where(row[None, :] == (MI - 1) // 2, ordered, 0.0), 1)
    upper = tl.sum(tl.where(row[None, :] == MI // 2, ordered, 0.0), 1)
    h = (lower + upper) * 0.5 / LOG_COUNT + FLOOR
    h = tl.where(tl.sum((d != d).to(tl.int32), 1) > 0, float("nan"), h)  # a sort may lose NaN
    kernel = tl.exp(-tl.where(inside, d, 0.0).to(tl.float64) / h[:, None])
    unsound = (d == float("inf")) | (d != d)
    kernel = tl.where(unsound, float("nan"), kernel)  # an infinity would only make a kernel value 0
    return h, tl.where(inside, kernel, 0.0)


@triton.jit
def _bandwidth_kernel(
    distances,  # [MI, C]
    bandwidth,  # [C]
    exact,  # [C]: the same in float64
    parts,  # [MI, programs], float64: sums of a program's kernel values
    C, programs,
    MI: tl.constexpr, ROWS: tl.constexpr, LOG_COUNT: tl.constexpr, FLOOR: tl.constexpr, STEPS: tl.constexpr,
    COLUMNS: tl.constexpr,
):  # fmt: skip
    """Medians of STEPS times COLUMNS columns, and for every row the sum of exp(-d / h) along them."""
    pid = tl.program_id(0).to(tl.int64)
    row = tl.arange(0, ROWS)
    sums = tl.zeros([ROWS], tl.float64)
    for step in range(STEPS):
        column = (pid * STEPS + step) * COLUMNS + tl.arange(0, COLUMNS)
        inside = (column < C)[:, None] & (row < MI)[None, :]
        d = tl.load(distances + row[None, :].to(tl.int64) * C + column[:, None], mask=inside, other=float("inf"))
        h, kernel = _medians(d, inside, MI, LOG_COUNT, FLOOR)
        tl.store(bandwidth + column, h, mask=column < C)
        tl.store(exact + column, h, mask=column < C)
        sums += tl.sum(kernel, 0)
    tl.store(parts + row * programs + pid, sums, mask=row < MI)


@triton.jit
def _row_sums(parts, first, programs, MI: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, STEPS: tl.constexpr):
    """parts [MI, programs] -> the sums of ROWS rows from the first on."""
    row = first + tl.arange(0, ROWS)
    sums = tl.zeros([ROWS, BLOCK], tl.float64)
    for step in range(STEPS):
        part = step * BLOCK + tl.arange(0, BLOCK)
        inside = (row < MI)[:, None] & (part < programs)[None, :]
        sums += tl.load(parts + row[:, None] * programs + part[None, :], mask=inside, other=0.0)
    return tl.sum(sums, 1)


@triton.jit
def _coefficients_kernel(
    distances,  # [MI, MJ, G]
    alignments,  # [MI, MJ, G], read when ALIGNED
    exact,  # [MJ, G], float64: bandwidths
    parts,  # [MI, programs], float64
    value,  # []
    coefficients,  # [MI, MJ, G]
    projection,  # [MI, G]
    G, programs,
    MI: tl.constexpr, MJ: tl.constexpr, ROWS: tl.constexpr, STEPS: tl.constexpr, BLOCK: tl.constexpr,
    STEPS_ALL: tl.constexpr, BLOCK_ALL: tl.constexpr, SAMPLES: tl.constexpr,
    ALIGNED: tl.constexpr,
):  # fmt: skip
    """One row on SAMPLES samples; the first program has the value too."""
    pid = tl.program_id(0)
    i = pid % MI
    g = pid // MI * SAMPLES + tl.arange(0, SAMPLES)[None, :]
    groups = tl.full((), 0.0, tl.float64) + G  # G may be a constant
    scale = -2.0 / (groups * _row_sums(parts, i, programs, MI, 1, BLOCK, STEPS))  # [1]
    aligned = tl.zeros([SAMPLES], tl.float64)
    for first in range(0, MJ, 16):
        j = first + tl.arange(0, 16)[:, None]
        inside = (j < MJ) & (g < G)
        at = (i * MJ + j).to(tl.int64) * G + g
        d = tl.load(distances + at, mask=inside, other=0.0)
        h = tl.load(exact + j.to(tl.int64) * G + g, mask=inside, other=1.0)
        c = scale * tl.exp(-d.to(tl.float64) / h) / h
        c = tl.where(d == 0, 0.0, c).to(d.dtype)
        tl.store(coefficients + at, c, mask=inside)
        if ALIGNED:
            a = tl.load(alignments + at, mask=inside, other=0.0)
            aligned += tl.sum(c.to(tl.float64) * a.to(tl.float64), 0)
    g = pid // MI * SAMPLES + tl.arange(0, SAMPLES)
    tl.store(projection + i.to(tl.int64) * G + g, aligned, mask=g < G)
    if pid == 0:
        sums = _row_sums(parts, 0, programs, MI, ROWS, BLOCK_ALL, STEPS_ALL)
        logs = tl.log(tl.where(tl.arange(0, ROWS) < MI, sums / groups, 1.0))
        tl.store(value, tl.sum(logs, 0) / groups)


@triton.jit
def _own_coefficients(
    distances,  # [M, M, G]
    alignments,  # [M, M, G]
    exact,  # [M, G], float64: bandwidths
    parts,  # [M, G], float64
    value,  # []
    coefficients,  # [G, M, M]
    projection,  # [M, G]
    g, G, M: tl.constexpr, STEPS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """All of one sample. Programs that share a sample write the same numbers, and read what they wrote themselves."""
    groups = tl.full((), 0.0, tl.float64) + G  # G may be a constant
    sums = _row_sums(parts, 0, G, M, 16, BLOCK, STEPS)
    i, j = tl.arange(0, 16)[:, None], tl.arange(0, 16)[None, :]
    inside = (i < M) & (j < M)
    at = (i * M + j).to(tl.int64) * G + g
    d = tl.load(distances + at, mask=inside, other=0.0)
    a = tl.load(alignments + at, mask=inside, other=0.0)
    h = tl.load(exact + j.to(tl.int64) * G + g, mask=inside, other=1.0)
    row = tl.arange(0, 16)
    scale = -2.0 / (groups * tl.where(row < M, sums, 1.0))
    c = scale[:, None] * tl.exp(-d.to(tl.float64) / h) / h
    c = tl.where(d == 0, 0.0, c).to(d.dtype)
    tl.store(coefficients + g * (M * M) + (i * M + j), c, mask=inside)
    t = tl.sum(c.to(tl.float64) * a.to(tl.float64), 1)
    tl.store(projection + row.to(tl.int64) * G + g, t, mask=row < M)
    if tl.program_id(0) == 0:
        logs = tl.log(tl.where(row < M, sums / groups, 1.0))
        tl.store(value, tl.sum(logs, 0) / groups)
    tl.debug_barrier()
