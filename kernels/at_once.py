"""The whole operation between a few particles at the default bandwidth, in as few launches as it takes.

The kernels are those of repulsion.py with more to do: distances end with the medians of their sample, mixing begins
with the sums over samples and makes its own coefficients. Schemas stand in forde_fast/operators.py.
"""

import torch

from . import repulsion as steps

# From here on it takes longer that every program of the mixing sums over the samples than that a launch does it once.
MANY_SAMPLES = 256


def at_once(particles, product, matrix, unit, normalize, eps, log_count):
    """
        q = None if product is None else product  # or, of normalised particles, contrasts times unit times the matrix
        d, alignment, inverse_norm = pair_distances(particles, None, q, normalize, eps)
        value, c, h, projection = median_rule(d, alignment, log_count)
        gradient = combine(particles, None, q, inverse_norm, c, projection if normalize else 0)
        return value, gradient, h, d

    in two launches and the product, where every sample's columns can be one program's. C is symmetric.

    particles [M, G, D], product [M - 1, G, D] or None, matrix [D, D] in float16 or None
    -> value [], gradient [M, G, D], h [M, G], d [M, M, G]
    """
    particles, product = steps._rows(particles), steps._rows(product)
    M, G, D = particles.shape
    norm = None
    if matrix is None:
        unit = 1.0
    else:
        z, norm = steps._contrasts(particles, None, True, eps, matrix.dtype)
        product, unit = torch.ops.forde_fast.matmul(z, matrix, "tf32"), unit / steps.HALF
    if steps._splits(G, D, 1)[0] > 1:
        product = product if unit == 1 else product * unit
        d, alignment, norm = steps.pair_distances(particles, None, product, normalize, eps)
        value, c, h, projection = steps.median_rule(d, alignment if normalize else None, log_count)
        return value, steps.combine(particles, None, product, norm, c, projection), h, d
    found = _Found(particles)
    constants = {"SOURCE": "particles" if product is None else "product", "EPS": eps, "UNIT": unit}
    constants |= {"NORM": "unit" if not normalize else "own" if norm is None else "given"}
    if norm is None:
        norm = _empty(particles, M, G) if normalize else steps._ones(particles, M)
    found.distances(particles, product, norm, constants, log_count)
    gradient = torch.empty(M, G, D, dtype=particles.dtype, device=particles.device)
    found.mix(particles, product, norm, gradient, unit, normalize)
    return found.value, gradient, found.h, found.d


def at_once_low_rank(particles, factor, first_factor, unit, tail, eps, log_count, precision):
    """
    The same, normalised, for C = F F^T + tail I with F [D, K] the factor.

    unit first_factor is nearly F; where it is in float16, the first product is of contrasts in float16 too. It has a
    row more than there are contrasts, the vector u that they have lost: alignments are (x_i - x_j) (x_i + u F), known
    before the gradient's columns are there, which so pass by once.
    """
    particles = steps._rows(particles)
    M, G, D = particles.shape
    z = torch.empty(M, G, D, dtype=first_factor.dtype, device=particles.device)
    norm, *of_tail = _contrasts_and_distances(particles, z, eps)
    x = torch.ops.forde_fast.matmul(z, first_factor, precision)
    unit = unit / steps.HALF if z.dtype == torch.float16 else unit
    found = _Found(x)
    constants = {"SOURCE": "coordinates", "NORM": "unit", "EPS": eps, "UNIT": unit * unit, "TAIL": tail}
    found.distances(x, x, norm, constants, log_count, of_tail)
    y = torch.empty_like(x)
    found.mix(None, x, norm, y, unit, False)
    mixed = torch.ops.forde_fast.matmul(y, factor.T, precision)
    gradient = torch.empty(M, G, D, dtype=particles.dtype, device=particles.device)
    steps._launch_combine(particles, None, norm, found.c, found.projection, mixed, gradient, unit=tail)
    return found.value, gradient, found.h, found.d


class _Found:
    """What is known of pairs and samples, for particles or coordinates [M, G, D]; M, G and the types are theirs."""

    def __init__(self, rows):
        M, G = rows.shape[:2]
        self.d, self.alignment = (_empty(rows, M, M, G) for _ in range(2))
        self.h, self.projection, self.value = _empty(rows, M, G), _empty(rows, M, G), _empty(rows)
        self.c = _empty(rows, G, M, M).permute(1, 2, 0)  # those of a sample together
        self.exact, self.parts = (torch.empty(M, G, dtype=torch.float64, device=rows.device) for _ in range(2))

    def distances(self, rows, product, norm, constants, log_count, tail=None):
        M, _, D = rows.shape
        of_product = constants["SOURCE"] == "product"
        tile = steps._pairs_tile(M, D, self.d.dtype, of_product, steps._chip(rows))
        constants |= {"STEPS": steps.triton.cdiv(D, tile["LANES"] * tile["V"])} | tile
        rule = self.h, self.exact, self.parts
        tensors = rows, product, norm, self.d[None], self.alignment[None]
        steps._launch_distances(*tensors, constants, tail=tail, rule=rule, log_count=log_count)

    def mix(self, particles, product, norm, gradient, unit, project):
        rule = self.d, self.alignment, self.exact, self.parts, self.value
        if self.d.shape[2] > MANY_SAMPLES:
            self.c = torch.empty_like(self.d)
            steps._launch_coefficients(*rule, self.c, self.projection)
            rule = None
        rest = norm, self.c, self.projection, None, gradient
        steps._launch_combine(particles, product, *rest, rule=rule, unit=unit, project=project)


def _empty(like, *size):
    return torch.empty(size, dtype=steps._types(like)[0], device=like.device)


def _contrasts_and_distances(particles, z, eps):
    """Writes z [M, G, D], the contrasts and what they have lost; -> inverse_norm, d, alignment of the particles."""
    M, G, D = particles.shape
    acc, ACC = steps._types(particles)
    tile = steps._pairs_tile(M, D, acc, False, steps._chip(particles))
    splits, count = steps._splits(G, D, tile["LANES"] * tile["V"])
    norm = _empty(particles, M, G) if splits == 1 else steps._inverse_norms(particles, None, eps)
    d, alignment = (_empty(particles, splits, M, M, G) for _ in range(2))
    constants = {"SOURCE": "particles", "NORM": "own" if splits == 1 else "given", "EPS": eps, "STEPS": count} | tile
    steps._launch_distances(particles, None, norm, d, alignment, constants, contrasts=z)
    return norm, steps._add_splits(d, ACC, "not negative", symmetric=True), steps._add_splits(alignment, ACC)
