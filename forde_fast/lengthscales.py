"""How differences of particles are weighed: the symmetric matrix C in d = (s_i - s_j)^T C (s_i - s_j).

A lengthscale offers `coordinates` (the definition, for the oracle), `product` (S C by the fewest operations, for
the backends) and `dimension`. Any object with these three is one. Source: Trinh et al., ICLR 2024, section 3.3.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from forde_fast import validation
from forde_fast.files import write
from forde_fast.validation import expect


class Lengthscale:
    """Base of the lengthscales: saving and loading."""

    def save(self, path: str | Path) -> None:
        """Write to a safetensors file; what was there before is replaced only when all is written."""
        tensors = {name: tensor.contiguous() for name, tensor in self._tensors().items()}
        write(path, save(tensors, metadata={"forde_fast.lengthscale": type(self).__name__}))

    @classmethod
    def load(cls, path: str | Path) -> Lengthscale:
        """Read what `save` wrote. Raises FileNotFoundError, and ValueError for a file of another kind."""
        expect(Path(path).is_file(), "path", "a file saved by a lengthscale", path, FileNotFoundError)
        try:
            with safe_open(path, framework="pt") as file:
                kind = (file.metadata() or {}).get("forde_fast.lengthscale")
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except SafetensorError as error:
            raise ValueError(f"path: expected a lengthscale in safetensors, got {path} ({error})") from None
        wanted = [k for k in (Identity, PCA) if issubclass(k, cls)]
        found = [k for k in wanted if k.__name__ == kind]
        expect(
            bool(found),
            "path",
            f"a file holding {' or '.join(k.__name__ for k in wanted)}",
            f"{path}: {kind}",
        )
        return found[0](**tensors)

    def _tensors(self) -> dict[str, Tensor]:
        raise NotImplementedError


class Identity(Lengthscale):
    """C = I: FoRDE-Identity."""

    dimension = None  # any D

    def coordinates(self, s: Tensor) -> Tensor:
        return s

    def product(self, s: Tensor) -> Tensor:
        return s

    def _tensors(self):
        return {}

    def __repr__(self):
        return "Identity()"


class PCA(Lengthscale):
    """C = U diag(lambda) U^T + tail (I - U U^T): FoRDE-PCA, and by `blend` FoRDE-Tuned.

    eigenvectors  [D, K], orthonormal columns (not checked); K <= D
    eigenvalues   [K], >= 0: variances. The published file of the paper stores their square roots.
    tail          weight of the directions that the K columns leave out; without meaning where K = D
    variance      total variance of the images that it was fitted on, by which the trainer sees whether it meets
                  others; 0: not known

    Kept in float64. Raises TypeError or ValueError for other shapes, dtypes or values.
    """

    def __init__(self, eigenvectors: Tensor, eigenvalues: Tensor, tail: float | Tensor = 0.0,
                 variance: float | Tensor = 0.0):  # fmt: skip
        validation.tensor_of_floats(eigenvectors, "eigenvectors", "D, K")
        validation.tensor_of_floats(eigenvalues, "eigenvalues", "K")
        size, rank = eigenvectors.shape
        expect(rank <= size, "eigenvectors", "K <= D columns", f"shape {list(eigenvectors.shape)}")
        expect(len(eigenvalues) == rank, "eigenvalues", f"{rank}, one per column", len(eigenvalues))
        validation.finite(eigenvectors, "eigenvectors")
        validation.finite(eigenvalues, "eigenvalues")
        expect(bool((eigenvalues >= 0).all()), "eigenvalues", "values >= 0", float(eigenvalues.min()))
        validation.positive(float(tail), "tail", allow_zero=True)
        devices = f"{eigenvectors.device} and {eigenvalues.device}"
        expect(eigenvectors.device == eigenvalues.device, "eigenvalues", "the eigenvectors' device", devices)
        self.eigenvectors = eigenvectors.detach().to(torch.float64, copy=True)
        self.eigenvalues = eigenvalues.detach().to(torch.float64, copy=True)
        validation.positive(float(variance), "variance", allow_zero=True)
        self.tail, self.variance = float(tail), float(variance)
        self._cache: dict = {}

    @property
    def dimension(self) -> int:
        return self.eigenvectors.shape[0]

    @property
    def rank(self) -> int:
        return self.eigenvectors.shape[1]

    @classmethod
    @torch.no_grad()
    def fit(cls, images: Tensor | Iterable, rank: int | None = None, center: bool = True,
            scale: str | None = None) -> PCA:  # fmt: skip
        """Eigenvectors and eigenvalues of X^T X / (N - 1), X the images as the model receives them.

        images  [N, ...] floating, or an iterable of such batches (or of (images, labels) pairs): read once, one
                batch at a time, accumulated in float64
        rank    keep this many of the largest; the tail is then the midrange of the others, which minimises
                the bound max |lambda - tail| |ds|^2 on the error in d
        center  subtract the mean image, as the paper says (the published file does not)
        scale   "unit_mean" divides by the mean eigenvalue, which fixes what a blend means
        """
        expect(scale in (None, "unit_mean"), "scale", "None or 'unit_mean'", repr(scale))
        if rank is not None:
            validation.whole(rank, "rank")
        covariance = _covariance(images, center)
        size = len(covariance)
        expect(rank is None or rank <= size, "rank", f"None or 1 to {size}", rank)
        eigenvalues, eigenvectors = torch.linalg.eigh(covariance)
        eigenvalues, eigenvectors = eigenvalues.flip(0).clamp_min(0), eigenvectors.flip(1)
        variance = eigenvalues.sum() if center else 0.0
        if scale == "unit_mean":
            expect(bool(eigenvalues.sum() > 0), "images", "some variance for scale='unit_mean'", "none")
            eigenvalues = eigenvalues / eigenvalues.mean()
        kept = size if rank is None else rank
        tail = (eigenvalues[kept] + eigenvalues[-1]) / 2 if kept < size else 0.0
        return cls(eigenvectors[:, :kept].contiguous(), eigenvalues[:kept], tail, variance)

    def blend(self, alpha: float, form: str = "arithmetic") -> PCA:
        """FoRDE-Tuned: C's eigenvalues between 1 (alpha = 0) and lambda (alpha = 1).

        form "arithmetic" is (1 - alpha) + alpha lambda, "harmonic" 1 / ((1 - alpha) + alpha / lambda), the blend
        of the lengthscales of the paper's appendix D.4. Between 0 and 1 both depend on the scale of lambda.
        """
        validation.one_of(form, "form", ("arithmetic", "harmonic"))
        good = isinstance(alpha, (int, float)) and 0 <= alpha <= 1
        expect(good, "alpha", "a number from 0 to 1", alpha)
        weights = torch.cat([self.eigenvalues, self.eigenvalues.new_tensor([self.tail])])
        if alpha == 0:
            weights = torch.ones_like(weights)
        elif form == "arithmetic":
            weights = (1 - alpha) + alpha * weights
        else:
            weights = weights / ((1 - alpha) * weights + alpha)  # 0 stays 0
        return PCA(self.eigenvectors, weights[:-1], weights[-1], self.variance)

    def coordinates(self, s: Tensor) -> Tensor:
        """x [..., K or K + D] with |x_i - x_j|^2 = d_ij: rotated and scaled, then what the columns leave out."""
        basis = self.eigenvectors.to(s)
        rotated = s @ basis
        scaled = rotated * self.eigenvalues.sqrt().to(s)
        if self.rank == self.dimension or self.tail == 0:
            return scaled
        return torch.cat([scaled, (s - rotated @ basis.T) * self.tail**0.5], dim=-1)

    def product(self, s: Tensor) -> Tensor:
        """S C: s [R, D] -> [R, D], by one product with C or by two thin ones where these are fewer operations."""
        tensors = self._operands(s.dtype, s.device)
        if len(tensors) == 1:
            return s @ tensors[0]
        basis, weights = tensors
        rotated = (s @ basis).mul_(weights)
        if self.tail == 0:
            return rotated @ basis.T
        return torch.addmm(s, rotated, basis.T, beta=self.tail)

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
        numbers = {name: torch.tensor(getattr(self, name), dtype=torch.float64) for name in ("tail", "variance")}
        return {"eigenvectors": self.eigenvectors, "eigenvalues": self.eigenvalues, **numbers}

    def __repr__(self):
        return f"PCA(D={self.dimension}, rank={self.rank}, tail={self.tail:.3g})"


def _covariance(images, center: bool) -> Tensor:
    """X^T X / (N - 1) in float64, from one reading; X less its mean where `center`."""
    count, total, square, origin = 0, None, None, None
    for batch in [images] if isinstance(images, Tensor) else images:
        rows = batch[0] if isinstance(batch, (tuple, list)) else batch
        expect(isinstance(rows, Tensor), "images", "tensors", type(rows).__name__, TypeError)
        expect(rows.is_floating_point(), "images", "floats, as the model receives them", rows.dtype, TypeError)
        shaped = rows.ndim >= 2 and rows.numel() > 0
        expect(shaped, "images", "[N, ...] with two dimensions or more, none empty", f"shape {list(rows.shape)}")
        validation.finite(rows, "images")
        if total is None:
            size = rows[0].numel()
            total, square = (torch.zeros(s, dtype=torch.float64, device=rows.device) for s in (size, (size, size)))
            # accumulated about a point near the mean: no cancellation when that is taken away at the end
            origin = rows.double().flatten(1).mean(0) if center else torch.zeros_like(total)
        expect(rows[0].numel() == size, "images", f"{size} values each, as in the first batch", rows[0].numel())
        for chunk in rows.split(4096):
            x = chunk.double().flatten(1) - origin
            count, total = count + len(x), total + x.sum(0)
            square.addmm_(x.T, x)
    expect(count >= 2, "images", "at least 2", count)
    if center:
        square.addr_(total, total, alpha=-1 / count)
    return square / (count - 1)
