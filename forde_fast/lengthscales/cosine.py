"""The discrete cosine basis as lengthscale: as close to principal components as a fixed basis of images comes."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from forde_fast import validation
from forde_fast.lengthscales.base import Lengthscale, blended
from forde_fast.lengthscales.streams import chunks
from forde_fast.validation import expect


class Cosine(Lengthscale):
    """C = T^T diag(weights) T, T the orthonormal DCT-II along every axis of an image.

    weights   [C, H, W], or any shape that the images have: of each cosine, lowest frequency first; >= 0
    variance  total variance of the images that it was fitted on, as for `PCA`; 0: not known

    Particles are the images' gradients, flattened: D = C H W. The transform is a product with one small matrix per
    axis, so that no D x D matrix exists. It goes over the channels too: on three of them it is Ohta's colour basis
    (1980), which the principal components of RGB are close to. Kept in float64.

    Raises TypeError or ValueError for weights of another dtype, not finite or negative.
    """

    def __init__(self, weights: Tensor, variance: float | Tensor = 0.0):
        expect(isinstance(weights, Tensor), "weights", "a torch.Tensor", type(weights).__name__, TypeError)
        good = weights.dtype in validation.FLOATS
        expect(good, "weights", "float32, float64 or bfloat16", weights.dtype, TypeError)
        shaped = weights.ndim >= 1 and weights.numel() > 0
        expect(shaped, "weights", "the shape of an image, none empty", f"shape {list(weights.shape)}")
        validation.finite(weights, "weights")
        expect(bool((weights >= 0).all()), "weights", "values >= 0", float(weights.min()))
        validation.positive(float(variance), "variance", allow_zero=True)
        self.variance = float(variance)
        self.weights = weights.detach().to(torch.float64, copy=True)
        self._cache: dict = {}

    @property
    def shape(self) -> torch.Size:
        return self.weights.shape

    @property
    def dimension(self) -> int:
        return self.weights.numel()

    @classmethod
    @torch.no_grad()
    def fit(cls, images: Tensor | Iterable, center: bool = True, scale: str | None = None) -> Cosine:
        """The images' variance along each cosine, images as the model receives them.

        images  [N, C, H, W], or [N, ...] of any shape, floating, or an iterable of such batches (or of (images,
                labels) pairs): read once, accumulated in float64
        center  subtract the mean image
        scale   "unit_mean" divides by the mean variance, which fixes what a blend means
        """
        expect(scale in (None, "unit_mean"), "scale", "None or 'unit_mean'", repr(scale))
        count, mean, squares = 0, 0.0, 0.0
        for x in chunks(images):
            cosines = _transform(x, [_dct(n, x.device) for n in x.shape[1:]])
            own = cosines.mean(0) if center else torch.zeros_like(cosines[0])
            shift, before, count = own - mean, count, count + len(x)
            squares = squares + (cosines - own).square().sum(0) + shift.square() * (before * len(x) / count)
            mean = mean + shift * (len(x) / count)
        weights = squares / (count - 1)
        variance = weights.sum() if center else 0.0
        if scale == "unit_mean":
            expect(bool(weights.sum() > 0), "images", "some variance for scale='unit_mean'", "none")
            weights = weights / weights.mean()
        return cls(weights, variance)

    def blend(self, alpha: float, form: str = "arithmetic") -> Cosine:
        """Weights between 1 (alpha = 0) and these (alpha = 1), by the formulas of `PCA.blend`."""
        return Cosine(blended(self.weights, alpha, form), self.variance)

    def coordinates(self, s: Tensor) -> Tensor:
        """x [..., D] with |x_i - x_j|^2 = d_ij: the cosines, scaled."""
        matrices, weights = self._operands(s.dtype, s.device)
        cosines = _transform(s.reshape(-1, *self.shape), matrices)
        return (cosines * weights.sqrt()).reshape(s.shape)

    def product(self, s: Tensor) -> Tensor:
        """S C: s [R, D] -> [R, D], there and back along every axis."""
        matrices, weights = self._operands(s.dtype, s.device)
        cosines = _transform(s.reshape(-1, *self.shape), matrices).mul_(weights)
        return _transform(cosines, [matrix.T for matrix in matrices]).reshape(s.shape)

    def _operands(self, dtype: torch.dtype, device: torch.device) -> tuple[list[Tensor], Tensor]:
        """One matrix per axis and the weights, made once in float64 for each dtype and device."""
        key = dtype, device
        if key not in self._cache:
            with torch.inference_mode(False):  # they are for later calls too
                matrices = [_dct(n, device).to(dtype) for n in self.shape]
                self._cache[key] = matrices, self.weights.to(device, dtype)
        return self._cache[key]

    def _tensors(self):
        return {"weights": self.weights, "variance": torch.tensor(self.variance, dtype=torch.float64)}

    def __repr__(self):
        return f"Cosine({' x '.join(map(str, self.shape))})"


def _dct(n: int, device) -> Tensor:
    """The orthonormal DCT-II [n, n]: row k is the cosine of k half periods, sampled at the middle of n pixels."""
    k, i = torch.arange(n, dtype=torch.float64, device=device)[:, None], torch.arange(n, device=device)
    matrix = torch.cos(math.pi / n * k * (i + 0.5)) * math.sqrt(2 / n)
    matrix[0] = math.sqrt(1 / n)
    return matrix


def _transform(x: Tensor, matrices: list[Tensor]) -> Tensor:
    """x [R, *shape] times a matrix along each axis of the shape, without bringing an axis to another place."""
    shape, after = x.shape, x.shape[1:].numel()
    for matrix in matrices:
        size = len(matrix)
        after //= size
        x = x.reshape(-1, size) @ matrix.T if after == 1 else matrix @ x.reshape(-1, size, after)
    return x.reshape(shape)
