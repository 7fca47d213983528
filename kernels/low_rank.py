"""What a lengthscale of low rank adds to the steps in repulsion.py: coordinates before, the projection after."""

import torch
import triton

from . import repulsion as steps
from .project import _coordinates_kernel, _project_kernel


def coordinates(particles, others, product, normalize, eps):
    """
        x = torch.cat([product.sum(0, True) / (math.sqrt(N) - 1), product])

    where a row that is normalised equal to an earlier one takes its x, which the sum and a matrix product may give it
    only nearly.

    particles [Mi, G, D], others [Mj, G, D] or None, product [N - 1, G, K] -> x [N, G, K]
    """
    particles, others, product = steps._rows(particles), steps._rows(others), product.contiguous()
    (MI, G, D), MJ = particles.shape, 0 if others is None else others.shape[0]
    N, K = MI + MJ, product.shape[2]
    x = torch.empty(N, G, K, dtype=product.dtype, device=product.device)
    others = particles if others is None else others
    rows = triton.next_power_of_2(N)
    constants = {"MI": MI, "MJ": MJ, "KAPPA": steps._kappa(N), "ROWS": rows, "FIRST": min(32, 2048 // rows)}
    constants |= {"NORMALIZE": normalize, "EPS": eps, "ACC": steps._types(particles)[1]}
    constants |= {"STEPS": triton.cdiv(D, 256), "STEPS_K": triton.cdiv(K, 256), "BLOCK": 256, "num_warps": 4}
    numbers = D, G, K, *steps._strides(particles, others)
    steps._launch(_coordinates_kernel, N * G, (particles, others, product, x), numbers, constants)
    return x


def project(particles, mixed, others, coefficients, normalize, eps):
    """
        s_i, s_j as in pair_distances
        v = mixed if coefficients is None else mixed + (coefficients[..., None] * (s_i - s_j)).sum(1)
        v = inverse_norm[..., None] * (v - (v * s).sum(-1, True) * s) if normalize else v
        return v.to(particles.dtype)

    particles [Mi, G, D], mixed [Mi, G, D], others [Mj, G, D] or None, coefficients [Mi, Mj, G] or None
    -> gradient [Mi, G, D] in the particles' dtype.
    """
    particles, mixed = steps._rows(particles), mixed.contiguous()
    M, G, D = particles.shape
    if not normalize:
        if coefficients is None:
            return mixed.to(particles.dtype)
        norm = steps._ones(particles, M if others is None else M + others.shape[0])
        return steps._combine(particles, others, None, norm, coefficients, torch.zeros_like(norm[:M]), mixed)
    acc, ACC = steps._types(particles)
    tile = steps._rows_tile(D, acc)
    splits, count = steps._splits(G, D, tile["LANES"] * tile["V"], M)
    constants = {"M": M, "EPS": eps, "STEPS": count, "ACC": ACC} | tile
    numbers = D, G, splits, *steps._strides(particles)

    def launch(stage, norm, along, out):
        tensors = particles, mixed, norm, along, out
        steps._launch(_project_kernel, G * splits * M, tensors, numbers, constants | {"STAGE": stage})
        return out

    gradient = torch.empty(M, G, D, dtype=particles.dtype, device=particles.device)
    if coefficients is None and splits == 1:
        return launch("all", mixed, mixed, gradient)
    squares, along = (torch.empty(splits, M, G, dtype=acc, device=particles.device) for _ in range(2))
    launch("sums", squares, along, mixed)
    along = steps._add_splits(along, ACC)
    if coefficients is None:
        inverse_norm = steps._add_splits(squares, ACC, "inverse root", eps)
        return launch("rest", inverse_norm, along * inverse_norm, gradient)
    _, alignment, inverse_norm = steps.pair_distances(particles, others, None, True, eps)
    projection = (coefficients * alignment).sum(1).addcmul_(along, inverse_norm[:M])
    return steps._combine(particles, others, None, inverse_norm, coefficients, projection, mixed)
