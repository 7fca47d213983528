"""The principal components of the images as lengthscale, whole or of low rank."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from forde_fast import validation
from forde_fast.lengthscales.base import Lengthscale, blended
from forde_fast.lengthscales.spectrum import spectrum_of
from forde_fast.precision import in_half, matmul
from forde_fast.validation import expect


class PCA(Lengthscale):
    """C = U diag(lambda) U^T + tail (I - U U^T): FoRDE-PCA, and by `blend` FoRDE-Tuned.

    eigenvectors  [D, K], orthonormal columns (not checked); K <= D
    eigenvalues   [K], >= 0: variances. The published file of the paper stores their square roots.
    tail          weight of the directions that the K columns leave out; without meaning where K = D
    variance      total variance of the images that it was fitted on, by which the trainer sees whether it meets
                  others; 0: not known
    error_bound   how far d can be from that under the covariance which C approximates, for normalised particles:
                  an absolute error, 4 |C - covariance| since |s_i - s_j|^2 <= 4. 0: C is meant as it is

    Kept in float64. Raises TypeError or ValueError for other shapes, dtypes or values.
    """

    def __init__(self, eigenvectors: Tensor, eigenvalues: Tensor, tail: float | Tensor = 0.0,
                 variance: float | Tensor = 0.0, error_bound: float | Tensor = 0.0):  # fmt: skip
        validation.tensor_of_floats(eigenvectors, "eigenvectors", "D, K")
        validation.tensor_of_floats(eigenvalues, "eigenvalues", "K")
        size, rank = eigenvectors.shape
        expect(rank <= size, "eigenvectors", "K <= D columns", f"shape {list(eigenvectors.shape)}")
        expect(len(eigenvalues) == rank, "eigenvalues", f"{rank}, one per column", len(eigenvalues))
        validation.finite(eigenvectors, "eigenvectors")
        validation.finite(eigenvalues, "eigenvalues")
        expect(bool((eigenvalues >= 0).all()), "eigenvalues", "values >= 0", float(eigenvalues.min()))
        for name, number in (("tail", tail), ("variance", variance), ("error_bound", error_bound)):
            validation.positive(float(number), name, allow_zero=True)
            setattr(self, name, float(number))
        devices = f"{eigenvectors.device} and {eigenvalues.device}"
        expect(eigenvectors.device == eigenvalues.device, "eigenvalues", "the eigenvectors' device", devices)
        self.eigenvectors = eigenvectors.detach().to(torch.float64, copy=True)
        self.eigenvalues = eigenvalues.detach().to(torch.float64, copy=True)
        self._thin = 2 * rank <= size and bool((self.eigenvalues >= self.tail).all())
        self._cache: dict = {}

    @property
    def dimension(self) -> int:
        return self.eigenvectors.shape[0]

    @property
    def rank(self) -> int:
        return self.eigenvectors.shape[1]

    @classmethod
    @torch.no_grad()
    def fit(cls, images: Tensor | Iterable, rank: int | None = None, center: bool = True, scale: str | None = None,
            *, error: float | None = None) -> PCA:  # fmt: skip
        """Eigenvectors and eigenvalues of X^T X / (N - 1), X the images as the model receives them.

        images  [N, ...] floating, or an iterable of such batches (or of (images, labels) pairs): read once, one
                batch at a time, accumulated in float64
        rank    keep this many of the largest; the tail is then the midrange of what the others may be, which
                minimises the bound on the error in d
        center  subtract the mean image, as the paper says (the published file does not)
        scale   "unit_mean" divides by the mean eigenvalue, which fixes what a blend means
        error   in place of `rank`: the smallest rank whose `error_bound` is at most this

        Up to D = 4096, and where neither rank nor error is given, the covariance is decomposed whole and all is
        exact. Beyond, no D x D matrix exists: a `Sketch` keeps the 2 rank (at least 256) heaviest directions and
        has three times as many rows of float64 in memory. As long as the images fit there all is exact; the trace,
        and so the scale, always is. Else the eigenvalues are lower bounds, and `error_bound` is computed from what
        the sketch had to drop: it holds for the images that were read, whatever they are and in any order.

        Raises TypeError or ValueError for bad arguments, and where the error asked for is below what one reading
        can promise.
        """
        expect(scale in (None, "unit_mean"), "scale", "None or 'unit_mean'", repr(scale))
        if rank is not None:
            validation.whole(rank, "rank")
        if error is not None:
            validation.positive(error, "error")
            expect(rank is None, "error", "None where a rank is given", error)
        spectrum = spectrum_of(images, rank, center, whole=rank is None and error is None)
        variance = spectrum.mean * spectrum.size if center else 0.0
        if scale == "unit_mean":
            expect(spectrum.mean > 0, "images", "some variance for scale='unit_mean'", "none")
            spectrum = spectrum.divided_by(spectrum.mean)
        kept = spectrum.rank_within(error) if error is not None else min(rank or spectrum.size, spectrum.rank)
        tail, bound = (float(x[kept - 1]) for x in spectrum.tails())
        return cls(spectrum.basis(kept), spectrum.eigenvalues[:kept], tail, variance, bound)

    def blend(self, alpha: float, form: str = "arithmetic") -> PCA:
        """FoRDE-Tuned: C's eigenvalues between 1 (alpha = 0) and lambda (alpha = 1).

        form "arithmetic" is (1 - alpha) + alpha lambda, "harmonic" 1 / ((1 - alpha) + alpha / lambda), the blend
        of the lengthscales of the paper's appendix D.4. Between 0 and 1 both depend on the scale of lambda.
        The error bound follows: alpha times it, and for "harmonic" by the same formula (which is operator
        monotone, so that |f(A) - f(C)| <= f(|A - C|): Ando, Math. Z. 1988).
        """
        weights = torch.cat([self.eigenvalues, self.eigenvalues.new_tensor([self.tail])])
        weights = blended(weights, alpha, form)
        error = self.error_bound / 4  # of C
        error = alpha * error if form == "arithmetic" or alpha == 0 else error / ((1 - alpha) * error + alpha)
        return PCA(self.eigenvectors, weights[:-1], weights[-1], self.variance, 4 * error)

    def coordinates(self, s: Tensor) -> Tensor:
        """x [..., K or K + D] with |x_i - x_j|^2 = d_ij: rotated and scaled, then what the columns leave out."""
        basis = self.eigenvectors.to(s)
        rotated = s @ basis
        scaled = rotated * self.eigenvalues.sqrt().to(s)
        if self.rank == self.dimension or self.tail == 0:
            return scaled
        return torch.cat([scaled, (s - rotated @ basis.T) * self.tail**0.5], dim=-1)

    def product(self, s: Tensor, precision: str = "tf32") -> Tensor:
        """S C: s [R, D] -> [R, D], by one product with C or by two thin ones where these are fewer operations."""
        tensors = self._operands(s.dtype, s.device)
        if len(tensors) == 1:
            return matmul(s, tensors[0], precision)
        basis, weights = tensors
        product = matmul(matmul(s, basis, precision).mul_(weights), basis.T, precision)
        return product.add_(s, alpha=self.tail) if self.tail else product

    def factors(self, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, float] | None:
        """(F [D, K], tail) with C = F F^T + tail I, made once; None where there is no such F or C is cheaper."""
        key = "factors", dtype, device
        if key not in self._cache:
            excess = self.eigenvalues - self.tail
            basis = self.eigenvectors * excess.clamp_min(0).sqrt()
            self._cache[key] = (basis.to(device, dtype).contiguous(), self.tail) if self._thin else None
        return self._cache[key]

    def in_half(self, device: torch.device) -> tuple[Tensor, float] | None:
        """(matrix, unit), made once: unit times the matrix in float16 is F of `factors`, or C where there are none.
        None where a product with C takes two matrices."""
        key = "half", device
        if key not in self._cache:
            factors = self.factors(torch.float32, device)
            matrix, *more = self._operands(torch.float32, device) if factors is None else factors[:1]
            self._cache[key] = None if more else in_half(matrix)
        return self._cache[key]

    def in_tiles(self, device: torch.device) -> tuple[Tensor, float]:
        """F of `in_half` in tiles of 8 by 8 numbers, [D / 8, K / 8, 8, 8], with zeros up to a multiple of 128 rows
        and columns; and its unit. Made once."""
        key = "tiles", device
        if key not in self._cache:
            matrix, unit = self.in_half(device)
            rows, columns = (-(-size // 128) * 16 for size in matrix.shape)
            padded = matrix.new_zeros(8 * rows, 8 * columns)
            padded[: matrix.shape[0], : matrix.shape[1]] = matrix
            self._cache[key] = padded.view(rows, 8, columns, 8).transpose(1, 2).contiguous(), unit
        return self._cache[key]

    def _operands(self, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, ...]:
        """(C,) or (U, lambda - tail), made once in float64 for each dtype and device."""
        key = dtype, device
        if key not in self._cache:
            excess = self.eigenvalues - (0.0 if self.rank == self.dimension else self.tail)
            if 2 * self.rank > self.dimension:
                matrix = (self.eigenvectors * excess) @ self.eigenvectors.T
                if self.rank < self.dimension:
                    matrix.diagonal().add_(self.tail)
                exact = (matrix,)
            else:
                exact = (self.eigenvectors, excess)
            self._cache[key] = tuple(tensor.to(device, dtype).contiguous() for tensor in exact)
        return self._cache[key]

    def _tensors(self):
        names = ("tail", "variance", "error_bound")
        numbers = {name: torch.tensor(getattr(self, name), dtype=torch.float64) for name in names}
        return {"eigenvectors": self.eigenvectors, "eigenvalues": self.eigenvalues, **numbers}

    def __repr__(self):
        return f"PCA(D={self.dimension}, rank={self.rank}, tail={self.tail:.3g}, error_bound={self.error_bound:.3g})"
