"""Rows of one sample in registers: tuples of tensors [LANES, V], V columns in each thread.

Tuples may have any length, where a tensor's sides are powers of two; the columns of all rows lie in the same
threads, so nothing passes between threads. Offsets grow from 64-bit row and sample numbers: M G D may pass 2^31.

The launchers switch multiply-add contraction off: fma(r, p, -s') would see the unrounded product on one side
only, equal rows would differ by a rounding, and a coefficient of 1e12 would show it. Where a fused multiply-add
is welcome it is written out.

Loops have a constant number of STEPS: Triton 3.6 interprets no other kind beside NumPy 2.4.
"""
# ruff: noqa: RUF005 (Triton does not know (*a, b))

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
def _multiple(x, V: tl.constexpr):
    """x itself, a multiple of V: so that the compiler knows it, and reads V columns at a time."""
    return x // V * V


@triton.jit
def _columns(LANES: tl.constexpr, V: tl.constexpr):
    return tl.arange(0, LANES)[:, None] * V + tl.arange(0, V)[None, :]


@triton.jit
def _zeros(like, COUNT: tl.constexpr):
    zeros = ()
    for _ in tl.static_range(COUNT):
        zeros = zeros + (tl.zeros_like(like),)
    return zeros


@triton.jit
def _load_row(pointer, d, D, ACC: tl.constexpr):
    return tl.load(pointer + d, mask=d < D, other=0.0).to(ACC)


@triton.jit
def _load_rows(base, stride, first, limit, d, D, COUNT: tl.constexpr, ACC: tl.constexpr):
    """COUNT rows from the first on; the last before the limit stands in for those beyond it."""
    rows = ()
    for k in tl.static_range(COUNT):
        rows = rows + (_load_row(base + tl.minimum(first + k, limit - 1) * stride, d, D, ACC),)
    return rows


@triton.jit
def _load_products(
    product, product_sum, stride, first, limit, d, D, KAPPA: tl.constexpr, COUNT: tl.constexpr, ACC: tl.constexpr
):
    """The same for q: its row n is the product's row n - 1, its row 0 KAPPA times the product's sum."""
    head = tl.where(first > 0, product + (first - 1) * stride, product_sum)
    factor = tl.where(first > 0, tl.full((), 1.0, ACC), tl.full((), KAPPA, ACC))
    rows = _load_rows(product, stride, first, limit - 1, d, D, COUNT - 1, ACC)
    return (_load_row(head, d, D, ACC) * factor,) + rows


@triton.jit
def _with_row_0(products, KAPPA: tl.constexpr, COUNT: tl.constexpr):
    """All COUNT + 1 rows of q from all COUNT of the product."""
    total = products[0]
    for k in tl.static_range(1, COUNT):
        total += products[k]
    return (total * KAPPA,) + products


@triton.jit
def _load_scalars(base, stride, first, limit, COUNT: tl.constexpr):
    scalars = ()
    for k in tl.static_range(COUNT):
        scalars = scalars + (tl.load(base + tl.minimum(first + k, limit - 1) * stride),)
    return scalars


@triton.jit
def _own_norms(
    base, stride, first, D, STEPS: tl.constexpr, COUNT: tl.constexpr, EPS: tl.constexpr,
    LANES: tl.constexpr, V: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """1 / norm of COUNT whole rows -> COUNT scalars."""
    squares = _zeros(tl.zeros([LANES, V], ACC), COUNT)
    for step in range(STEPS):
        d = step * (LANES * V) + _columns(LANES, V)
        rows = _load_rows(base, stride, first, first + COUNT, d, D, COUNT, ACC)
        new = ()
        for k in tl.static_range(COUNT):
            new = new + (tl.fma(rows[k], rows[k], squares[k]),)
        squares = new
    r = ()
    for k in tl.static_range(COUNT):
        r = r + (_inverse_root(tl.sum(tl.sum(squares[k], 1), 0) + EPS),)
    return r


@triton.jit
def _scale(rows, r, COUNT: tl.constexpr):
    scaled = ()
    for k in tl.static_range(COUNT):
        scaled = scaled + (rows[k] * r[k],)
    return scaled


@triton.jit
def _split(rows, COUNT: tl.constexpr, V: tl.constexpr):
    """COUNT tensors [LANES, V] -> V tuples of COUNT tensors [LANES]."""
    if V == 1:
        flat = ()
        for k in tl.static_range(COUNT):
            flat = flat + (tl.reshape(rows[k], [rows[k].shape[0]]),)
        return (flat,)
    else:
        even = ()
        odd = ()
        for k in tl.static_range(COUNT):
            a, b = tl.split(tl.reshape(rows[k], [rows[k].shape[0], V // 2, 2]))
            even = even + (a,)
            odd = odd + (b,)
        return _split(even, COUNT, V // 2) + _split(odd, COUNT, V // 2)
