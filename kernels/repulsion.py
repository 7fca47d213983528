"""The repulsion operation's steps in Triton; their schemas stand in forde_fast/operators.py.

Rows s_n = p_n / sqrt(|p_n|^2 + eps) are the particles' [Mi, G, D], then the others' [Mj, G, D]: N rows, G samples,
D columns. Callers have validated shapes and types. All results are deterministic: where D is split over programs,
their partial sums go to a small buffer. Nothing here waits for the device: all of it can be in a CUDA graph.
"""

import math

import torch
import triton
import triton.language as tl

from . import tiles
from .combine import _combine_blocks_kernel, _combine_kernel
from .contrasts import _contrasts_blocks_kernel, _contrasts_kernel, _norms_kernel
from .few import _pair_distances_kernel
from .pairs import _pair_blocks_kernel
from .provisional import _sampled_norms_kernel, _settle_kernel
from .rule import _bandwidth_kernel, _coefficients_kernel
from .splits import _add_splits_kernel
from .tiles import (
    COMBINE_BLOCK,
    CONTRASTS_BLOCK,
    PROGRAMS,
    ROWS_AT_ONCE,
    _blocks_tile,
    _even_blocks,
    _most_rows_at_once,
    _pairs_tile,
    _rows_tile,
    _splits,
)

FLOOR = 1e-12  # of the bandwidth
HALF = 2.0**13  # the unit of contrasts in float16: of unit vectors, they are at most 3.5 long


def _types(particles):
    """The accumulation type, torch's and Triton's."""
    return (torch.float64, tl.float64) if particles.dtype == torch.float64 else (torch.float32, tl.float32)


def _chip(x):
    """The compute capability's first number, 0 where there is no GPU."""
    return torch.cuda.get_device_capability(x.device)[0] if x.is_cuda else 0


def _rows(x):
    """Rows that lie in one piece each, and as far apart as `_multiple` says."""
    if x is None:
        return None
    apart = [x.stride(k) % math.gcd(4, x.shape[2]) for k in (0, 1) if x.shape[k] > 1]
    return x.contiguous() if any(apart) or x.stride(2) != 1 else x


def _strides(*tensors):
    return [x.stride(k) for x in tensors for k in (0, 1)]


def _kappa(N):
    """Row 0 of q over the sum of the other rows."""
    return 1 / (math.sqrt(N) - 1) if N > 1 else 0.0


def _unit(contrasts):
    return HALF if contrasts is not None and contrasts.dtype == torch.float16 else 1.0


def _ones(particles, N):
    return torch.ones(N, particles.shape[1], dtype=_types(particles)[0], device=particles.device)


def _launch(kernel, programs, tensors, numbers, constants):
    with torch.cuda.device_of(tensors[0]):
        kernel[(programs,)](*tensors, *numbers, **constants, enable_fp_fusion=False)


def _inverse_norms(particles, others, eps, repair=None):
    """1 / norm [N, G] of all rows; repair: as in _add_splits."""
    M, G, D = particles.shape
    N = M if others is None else M + others.shape[0]
    acc, ACC = _types(particles)
    tile = _rows_tile(D, acc)
    splits, steps = _splits(G, D, tile["LANES"] * tile["V"])
    norms = torch.empty(splits, N, G, dtype=acc, device=particles.device)
    for rows, out in ((particles, norms), (others, norms[:, M:])):
        if rows is not None:
            whole = splits == 1 and repair is None
            constants = {"M": rows.shape[0], "EPS": eps, "WHOLE": whole, "REPAIR": repair is not None}
            constants |= {"STEPS": steps, "ACC": ACC} | tile
            numbers = D, G, splits, *_strides(rows), N * G
            tensors = rows, out, out if repair is None else repair[1]
            _launch(_norms_kernel, G * splits * rows.shape[0], tensors, numbers, constants)
    return _add_splits(norms, ACC, "inverse root", eps, repair=repair)


def _add_splits(parts, ACC, finish="", eps=0.0, symmetric=False, repair=None):
    """parts [splits, ..., G] -> [..., G]; what one program saw whole it has finished.

    repair: the result so far, and unsound [G], the samples that are written to it
    """
    if parts.shape[0] == 1 and repair is None:
        return parts[0]
    if repair is not None:
        repair = repair[0][None], repair[1]
    return _add_stacks(parts[None], ACC, finish, eps, symmetric, repair)[0]


def _add_stacks(parts, ACC, finish="", eps=0.0, symmetric=False, repair=None):
    """parts [stacks, splits, ..., G] -> [stacks, ..., G], in one launch."""
    dtype = {tl.float32: torch.float32, tl.float64: torch.float64}[ACC]
    total, unsound = repair or (torch.empty_like(parts[:, 0], dtype=dtype), parts)
    stacks, splits, count = *parts.shape[:2], parts[0, 0].numel()
    constants = {"M": parts.shape[2] if symmetric else 0, "FINISH": finish, "EPS": eps, "ACC": ACC}
    constants |= {"REPAIR": repair is not None}
    constants |= {"STEPS": triton.cdiv(splits, 32), "ROWS": 32, "BLOCK": 64, "num_warps": 4}
    numbers = count, splits, parts.shape[-1]
    _launch(_add_splits_kernel, stacks * triton.cdiv(count, 64), (parts, total, unsound), numbers, constants)
    return total


def contrasts(particles, others, normalize, eps):
    """
        s = torch.cat([particles, others])
        s = s * (s.square().sum(-1, keepdim=True) + eps).rsqrt() if normalize else s
        u = s[1:].sum(0) / (N - math.sqrt(N)) - s[0] / math.sqrt(N)
        return s[1:] - u

    from the differences to s[0]: rows close together keep their relative accuracy.

    particles [Mi, G, D], others [Mj, G, D] or None; N >= 2 -> z [N - 1, G, D], float32 (float64 for float64).
    """
    return _contrasts(particles, others, normalize, eps)[0]


def _contrasts(particles, others, normalize, eps, dtype=None):
    """z, in units of 1 / HALF if in float16; inverse_norm [N, G]."""
    particles, others = _rows(particles), _rows(others)
    (MI, G, D), MJ = particles.shape, 0 if others is None else others.shape[0]
    N = MI + MJ
    acc, ACC = _types(particles)
    few = N <= ROWS_AT_ONCE
    own = normalize and few and _splits(G, D, 1)[0] == 1
    tile = _rows_tile(D, acc, warps=8 if own else 4)
    steps = triton.cdiv(D, tile["LANES"] * tile["V"])
    splits, steps = (1, steps) if own else (steps, 1)
    if own:
        norm, inverse_norm = "own", torch.empty(N, G, dtype=acc, device=particles.device)
    elif normalize:
        norm, inverse_norm = "given", _inverse_norms(particles, others, eps)
    else:
        norm, inverse_norm = "unit", _ones(particles, N)
    z = torch.empty(N - 1, G, D, dtype=dtype or acc, device=particles.device)
    others = particles if others is None else others
    tensors = particles, others, inverse_norm, z
    numbers = D, G, splits, *_strides(particles, others)
    constants = {"MI": MI, "MJ": MJ, "WEIGHT": 1 / (N - math.sqrt(N)), "UNIT": _unit(z), "ACC": ACC} | tile
    if few:
        constants |= {"NORM": norm, "EPS": eps, "STEPS": steps}
        _launch(_contrasts_kernel, G * splits, tensors, numbers, constants)
    else:
        constants |= {"BLOCK": CONTRASTS_BLOCK}
        _launch(_contrasts_blocks_kernel, G * splits, tensors, numbers, constants)
    return z, inverse_norm


def pair_distances(particles, others, product, normalize, eps):
    """
        q = s if product is None else torch.cat([product.sum(0, True) / (math.sqrt(N) - 1), product])
        s_i, q_i, s_j, q_j = s[:Mi, None], q[:Mi, None], s[None, -Mj:], q[None, -Mj:]  # s as in contrasts
        d = ((q_i - q_j) * (s_i - s_j)).sum(-1).clamp(min=0)
        alignment = ((q_i - q_j) * s_i).sum(-1)
        return d, alignment, inverse_norm

    without the [Mi, Mj, G, D] tensors. With others None, d is symmetric and 0 on the diagonal. NaN stays NaN.

    particles [Mi, G, D], others [Mj, G, D] or None, product [N - 1, G, D] or None
    -> d [Mi, Mj, G], alignment [Mi, Mj, G], inverse_norm [N, G], float32 (float64 for float64).
    """
    acc, ACC = _types(particles)
    particles, others, product = _rows(particles), _rows(others), _rows(product)
    if others is None and 2 <= particles.shape[0] <= _most_rows_at_once(acc):
        if product is None and normalize and _passes_once(particles):
            return _distances_in_one_pass(particles, eps)
        d, alignment, inverse_norm = _distances_at_once(particles, product, normalize, eps)
    else:
        d, alignment, inverse_norm = _distances_in_blocks(particles, others, product, normalize, eps)
    d = _add_splits(d, ACC, "not negative", symmetric=others is None)
    return d, _add_splits(alignment, ACC), inverse_norm


def _distances_at_once(particles, product, normalize, eps):
    """d [splits, M, M, G], alignment likewise, inverse_norm [M, G]: one launch unless D is split."""
    M, G, D = particles.shape
    acc, _ = _types(particles)
    tile = _pairs_tile(M, D, acc, product is not None, _chip(particles))
    splits, steps = _splits(G, D, tile["LANES"] * tile["V"])
    norm = ("own" if splits == 1 else "given") if normalize else "unit"
    if norm == "own":
        inverse_norm = torch.empty(M, G, dtype=acc, device=particles.device)
    else:
        inverse_norm = _inverse_norms(particles, None, eps) if normalize else _ones(particles, M)
    d, alignment = (torch.empty(splits, M, M, G, dtype=acc, device=particles.device) for _ in range(2))
    constants = {"SOURCE": "particles" if product is None else "product", "NORM": norm, "EPS": eps}
    _launch_distances(particles, product, inverse_norm, d, alignment, tile | {"STEPS": steps} | constants)
    return d, alignment, inverse_norm


def _passes_once(particles):
    _, G, D = particles.shape
    return _splits(G, D, 1)[0] > 1 and particles.numel() * particles.element_size() > tiles.MANY_BYTES


def _distances_in_one_pass(particles, eps):
    """d [M, M, G], alignment likewise, inverse_norm [M, G] of normalised rows: provisional.py says how."""
    M, G, D = particles.shape
    acc, ACC = _types(particles)
    d, alignment = (torch.empty(M, M, G, dtype=acc, device=particles.device) for _ in range(2))
    provisional, inverse_norm = (torch.empty(M, G, dtype=acc, device=particles.device) for _ in range(2))
    unsound = torch.empty(G, dtype=torch.int32, device=particles.device)
    tile = _pairs_tile(M, D, acc, False, _chip(particles))
    splits, steps = _splits(G, D, tile["LANES"] * tile["V"])
    parts = torch.empty(2, splits, M, M, G, dtype=acc, device=particles.device)
    constants = tile | {"STEPS": steps, "SOURCE": "particles", "EPS": eps}

    sample = {"M": M, "EPS": eps, "PIECES": tiles.PIECES, "COLUMNS": tiles.PIECE, "ACC": ACC, "num_warps": 16}
    _launch(_sampled_norms_kernel, M * G, (particles, provisional), (D, G, *_strides(particles)), sample)
    _launch_distances(particles, None, provisional, *parts, constants | {"NORM": "provisional"})
    tensors = *_add_stacks(parts, tl.float64), provisional, d, alignment, inverse_norm, unsound
    _launch(_settle_kernel, G, tensors, (G,), {"M": M, "EPS": eps, "WORST": tiles.WORST, "num_warps": 4})

    _inverse_norms(particles, None, eps, (inverse_norm, unsound))
    _launch_distances(particles, None, inverse_norm, *parts, constants | {"NORM": "given"}, unsound=unsound)
    _add_splits(parts[0], ACC, "not negative", symmetric=True, repair=(d, unsound))
    _add_splits(parts[1], ACC, repair=(alignment, unsound))
    return d, alignment, inverse_norm


def _launch_distances(particles, product, inverse_norm, d, alignment, constants, tail=None, contrasts=None, rule=None,
                      log_count=1.0, unsound=None):  # fmt: skip
    """d [splits, M, M, G], alignment likewise; of the samples that are unsound, where that is given.

    tail: its d and alignment; contrasts [M, G, D], written; rule: h, exact h and parts, which come of the medians
    """
    (M, G, D), splits = particles.shape, len(d)
    w = particles if product is None else product
    numbers = D, G, splits, *_strides(particles, w)
    constants = {"M": M, "KAPPA": _kappa(M), "UNIT": 1.0, "TAIL": 0.0, "HAS_TAIL": tail is not None} | constants
    constants |= {"CONTRASTS": contrasts is not None, "WEIGHT": 1 / (M - math.sqrt(M)), "RULE": rule is not None}
    constants |= {"CONTRASTS_UNIT": _unit(contrasts)}
    constants |= {"LOG_COUNT": log_count, "FLOOR": FLOOR, "WHOLE": splits == 1, "REPAIR": unsound is not None}
    constants |= {"ACC": _types(d)[1]}
    tensors = particles, w, inverse_norm, *(tail or (d, alignment)), d, alignment
    tensors += (d if contrasts is None else contrasts, *(rule or (d, d, d)), d if unsound is None else unsound)
    _launch(_pair_distances_kernel, G * splits, tensors, numbers, constants)


def _distances_in_blocks(particles, others, product, normalize, eps):
    """d [splits, Mi, Mj, G], alignment likewise, inverse_norm [N, G]; norms and row 0 of q are found beforehand."""
    same = others is None
    N = particles.shape[0] + (0 if same else others.shape[0])
    inverse_norm = _inverse_norms(particles, others, eps) if normalize else _ones(particles, N)
    others = particles if same else others
    (MI, G, D), MJ = particles.shape, others.shape[0]
    acc, ACC = _types(particles)
    tile = _blocks_tile(MI, MJ, D, acc)
    blocks = triton.cdiv(MI, tile["BLOCK_I"]) * triton.cdiv(MJ, tile["BLOCK_J"])
    splits, steps = _splits(G, D, tile["LANES"] * tile["V"], blocks)
    w, w_sum = (particles, particles) if product is None else (product, product.sum(0))
    d, alignment = (torch.empty(splits, MI, MJ, G, dtype=acc, device=particles.device) for _ in range(2))
    tensors = particles, others, w, w_sum, inverse_norm, d, alignment
    numbers = D, G, splits, *_strides(particles, others, w)
    constants = {"MI": MI, "MJ": MJ, "SAME": same, "HAS_PRODUCT": product is not None, "KAPPA": _kappa(N)}
    constants |= {"SCALED": normalize, "WHOLE": splits == 1, "STEPS": steps, "ACC": ACC} | tile
    _launch(_pair_blocks_kernel, G * splits * blocks, tensors, numbers, constants)
    return d, alignment, inverse_norm


def median_rule(distances, alignment, log_count):
    """
        h = median(distances, 0) / log_count + 1e-12  # the mean of the middle two
        kernel = torch.exp(-distances / h)
        rows = kernel.sum((1, 2), keepdim=True)
        value = (rows / G).log().sum() / G
        c = torch.where(distances == 0, 0, -2 / G * kernel / rows / h)
        return value, c, h, (c * alignment).sum(1)

    in float64; the value is NaN where a distance is not finite, the projection 0 without an alignment.

    distances [Mi, Mj, G], alignment [Mi, Mj, G] or None -> value [], c [Mi, Mj, G], h [Mj, G], projection [Mi, G]
    """
    distances = distances.contiguous()
    alignment = None if alignment is None else alignment.contiguous()
    MI, MJ, G = distances.shape
    C = MJ * G
    rows = triton.next_power_of_2(MI)
    # 8 columns are the 32 bytes that come from memory together; a thread sorts 4 to 8 numbers
    columns = min(8, triton.next_power_of_2(C))
    steps = triton.cdiv(C, columns * PROGRAMS)
    programs = triton.cdiv(C, columns * steps)
    value, c, h = distances.new_empty(()), torch.empty_like(distances), distances.new_empty(MJ, G)
    projection = distances.new_empty(MI, G)
    exact, parts = (distances.new_empty(size, dtype=torch.float64) for size in ((MJ, G), (MI, programs)))
    constants = {"MI": MI, "ROWS": rows, "LOG_COUNT": log_count, "FLOOR": FLOOR, "STEPS": steps, "COLUMNS": columns}
    constants |= {"num_warps": min(4, triton.cdiv(rows * columns, 128))}
    _launch(_bandwidth_kernel, programs, (distances, h, exact, parts), (C, programs), constants)

    _launch_coefficients(distances, alignment, exact, parts, value, c, projection)
    return value, c, h, projection


def _launch_coefficients(distances, alignment, exact, parts, value, c, projection):
    (MI, MJ, G), programs = distances.shape, parts.shape[1]
    rows, samples = triton.next_power_of_2(MI), min(32, triton.next_power_of_2(G))
    block, block_all = (min(most, triton.next_power_of_2(programs)) for most in (256, 2048 // rows))
    constants = {"MI": MI, "MJ": MJ, "ROWS": rows, "STEPS": triton.cdiv(programs, block), "BLOCK": block}
    constants |= {"STEPS_ALL": triton.cdiv(programs, block_all), "BLOCK_ALL": block_all}
    constants |= {"SAMPLES": samples, "ALIGNED": alignment is not None, "num_warps": 4}
    tensors = distances, distances if alignment is None else alignment, exact, parts, value, c, projection
    _launch(_coefficients_kernel, MI * triton.cdiv(G, samples), tensors, (G, programs), constants)


def combine(particles, others, product, inverse_norm, coefficients, projection):
    """
        s_i, q_i, q_j as in pair_distances
        gradient = (coefficients[..., None] * (q_i - q_j)).sum(1) - projection[..., None] * s_i
        return (inverse_norm[:Mi, :, None] * gradient).to(particles.dtype)

    without the [Mi, Mj, G, D] tensor. A pair with q_i = q_j adds exactly 0, whatever its finite coefficient.

    particles [Mi, G, D], others [Mj, G, D] or None, product [N - 1, G, D] or None, inverse_norm [N, G],
    coefficients [Mi, Mj, G], projection [Mi, G] -> gradient [Mi, G, D] in the particles' dtype.
    """
    return _combine(particles, others, product, inverse_norm, coefficients, projection, None)


def _combine(particles, others, product, inverse_norm, coefficients, projection, mixed):
    """combine, with mixed [Mi, G, D] added to the sum where it is given."""
    same = others is None
    particles, product = _rows(particles), _rows(product)
    others = particles if same else _rows(others)
    (MI, G, D), MJ = particles.shape, others.shape[0]
    acc, ACC = _types(particles)
    small = [x.contiguous() for x in (inverse_norm, coefficients, projection)]
    gradient = torch.empty(MI, G, D, dtype=particles.dtype, device=particles.device)
    if same and MI <= ROWS_AT_ONCE:
        _launch_combine(particles, product, *small, mixed, gradient)
        return gradient
    tile = _rows_tile(D, acc)
    tiles = triton.cdiv(D, tile["LANES"] * tile["V"])
    block = _even_blocks(MI, COMBINE_BLOCK)
    w, w_sum = (particles, particles) if product is None else (product, product.sum(0))
    tensors = particles, others, w, w_sum, *small, gradient if mixed is None else mixed, gradient
    numbers = D, G, tiles, *_strides(particles, others, w)
    constants = {"MI": MI, "MJ": MJ, "SAME": same, "HAS_PRODUCT": product is not None, "HAS_MIXED": mixed is not None}
    constants |= {"KAPPA": _kappa(MI if same else MI + MJ), "BLOCK_I": block, "ACC": ACC} | tile
    _launch(_combine_blocks_kernel, G * tiles * triton.cdiv(MI, block), tensors, numbers, constants)
    return gradient


def _launch_combine(particles, product, inverse_norm, coefficients, projection, mixed, gradient, rule=None, unit=1.0,
                    project=True):  # fmt: skip
    """A few rows. Without `project` the gradient is the sum alone, and needs no particles where there is a product.

    rule: d, alignment, exact h, parts and the value, for coefficients and projection to be made here
    """
    M, G, D = gradient.shape
    acc, ACC = _types(gradient)
    tile = _rows_tile(D, acc)
    tiles = triton.cdiv(D, tile["LANES"] * tile["V"])
    rows = product if particles is None else particles
    w = rows if product is None else product
    block = min(128, triton.next_power_of_2(G))
    constants = {"M": M, "HAS_PRODUCT": product is not None, "HAS_MIXED": mixed is not None, "KAPPA": _kappa(M)}
    constants |= {"UNIT": unit, "RULE": rule is not None, "STEPS": triton.cdiv(G, block), "BLOCK": block}
    constants |= {"PROJECT": project, "ACC": ACC} | tile
    tensors = rows, w, inverse_norm, *(rule or [coefficients] * 5), coefficients, projection
    tensors += (gradient if mixed is None else mixed, gradient)
    numbers = D, G, tiles, *_strides(rows, w), coefficients.stride(1), coefficients.stride(2)
    _launch(_combine_kernel, G * tiles, tensors, numbers, constants)
