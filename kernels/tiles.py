"""How many rows and columns a program of the repulsion kernels has, and why.

Chosen by measurements on an H100 (bench/gpu.md), within what a thread's 255 registers hold.
"""

import math

import torch
import triton

# Rows that a program of contrasts or combine keeps at once, and the rows of its blocks where there are more: four
# programs of four warps fit a multiprocessor, also where the rows of a block have their sums beside them.
ROWS_AT_ONCE, CONTRASTS_BLOCK, COMBINE_BLOCK = 16, 8, 8

# Two programs, one after the other, for each multiprocessor of the largest chips: the sums of one fill it. D is split
# over programs where there are few samples, and a program alone with its sample would take longer than the launches
# that it saves.
PROGRAMS = 264
FEW_SAMPLES, MANY_COLUMNS = 128, 8192

# More than a cache keeps from one pass to the next: from here on, particles are not read for their norms alone.
MANY_BYTES = 2**26
# The columns from which norms are guessed, and the terms that a distance may come of, in units of it.
PIECES, PIECE, WORST = 64, 256, 4.0


def _vectors(V, D, warps):
    """LANES threads with V neighbouring columns each, fewer where rows are unaligned: no more than D needs."""
    warps = min(warps, triton.next_power_of_2(triton.cdiv(D, 32 * V)))
    return {"LANES": 32 * warps, "V": math.gcd(V, D), "num_warps": warps}


def _even_blocks(rows, most):
    """The rows of each block when there are as few blocks as possible."""
    return triton.cdiv(rows, triton.cdiv(rows, most))


def _most_rows_at_once(acc):
    """All pairs in one program: half of M (M + 1) of a thread's 255 registers for the sums, twice that in float64."""
    return 16 if acc == torch.float32 else 10


def _pairs_tile(M, D, acc, product, chip):
    """The fewer sums a thread has, the more columns of its rows fit beside them; of a product it has rows too, and
    for chips of compute capability 10 the compiler of Triton 3.6 takes more registers."""
    most = 9 if product and chip >= 10 else 10
    V = (4 if most >= M else 2 if M <= 13 else 1) if acc == torch.float32 else 1
    return _vectors(V, D, 8)


def _blocks_tile(MI, MJ, D, acc):
    """Blocks of up to 8 by 8 pairs, 128 sums; 4 by 4 in float64. There are many blocks, so each has few threads: the
    final sum over threads costs a thread as much as dozens of columns."""
    most = 8 if acc == torch.float32 else 4
    blocks = {"BLOCK_I": _even_blocks(MI, most), "BLOCK_J": _even_blocks(MJ, most)}
    V = 2 if acc == torch.float32 and blocks["BLOCK_I"] * blocks["BLOCK_J"] <= 40 else 1
    return blocks | _vectors(V, D, 2)


def _rows_tile(D, acc, warps=4):
    """16 bytes of each row in a thread: a row or a block of them is on its way at once."""
    V = 4 if acc == torch.float32 else 2
    tile = _vectors(V, D, warps)
    return tile | {"LANES": tile["LANES"] * V // tile["V"]}  # as many columns where fewer lie together


def _splits(G, D, block, programs=1):
    """(programs along D, steps of `block` columns in each), where a sample has `programs` of them already."""
    wanted = 1
    if G * programs < FEW_SAMPLES and D > MANY_COLUMNS:
        wanted = min(triton.cdiv(2 * D, MANY_COLUMNS), triton.cdiv(PROGRAMS, G * programs))
    steps = triton.cdiv(D, wanted * block)
    return triton.cdiv(D, steps * block), steps
