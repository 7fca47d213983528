"""The sum over programs where D was split over them."""

import triton
import triton.language as tl

from .rows import _inverse_root


@triton.jit
def _add_splits_kernel(
    parts,  # [stacks, splits, count]
    total,  # [stacks, count]
    unsound,  # [G], read when REPAIR: only samples that are unsound are written
    count, splits, G,
    M: tl.constexpr,  # when not 0, count is [M, M, G] and symmetric
    FINISH: tl.constexpr, EPS: tl.constexpr, REPAIR: tl.constexpr,
    STEPS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    # torch.sum adds some columns in another order than others: equal rows would get unequal norms
    blocks = tl.cdiv(count, BLOCK)
    stack, block = tl.program_id(0).to(tl.int64) // blocks, tl.program_id(0).to(tl.int64) % blocks
    parts += stack * splits * count
    total += stack * count
    index = block * BLOCK + tl.arange(0, BLOCK)
    wanted = index < count
    if REPAIR:
        wanted = wanted & (tl.load(unsound + index % G) != 0)
    source = index
    if M > 0:
        i, j = index // (M * G), index // G % M
        source = (tl.minimum(i, j) * M + tl.maximum(i, j)) * G + index % G
    split = tl.arange(0, ROWS).to(tl.int64)[:, None]
    sums = tl.zeros([ROWS, BLOCK], ACC)
    for step in range(STEPS):
        row = split + step * ROWS
        inside = (row < splits) & wanted[None, :]
        sums += tl.load(parts + row * count + source[None, :], mask=inside, other=0.0)
    x = tl.sum(sums, 0)
    if FINISH == "inverse root":
        x = _inverse_root(x + EPS)
    elif FINISH == "not negative":
        x = tl.where(x < 0, 0.0, x)  # unlike a maximum, this keeps NaN
    tl.store(total + index, x, mask=wanted)
