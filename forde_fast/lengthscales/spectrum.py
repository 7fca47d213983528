"""What is known of the images' covariance after one reading: decomposed whole, or its heaviest directions."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from forde_fast.lengthscales.sketch import Sketch
from forde_fast.lengthscales.streams import chunks
from forde_fast.validation import expect

COVARIANCE_LIMIT = 4096  # D up to which the covariance is formed, whatever the rank
WHOLE_LIMIT = 32768  # D up to which it may be where no rank is given: 8 GiB
FEWEST_KEPT = 256  # directions: fewer would save little and loosen the bound
MOST_KEPT, MOST_BYTES = 1024, 2**31  # where a requested error leaves their number open


class Spectrum(NamedTuple):
    """A covariance A = V diag(eigenvalues) V^T + R, where 0 <= R <= lost I.

    eigenvalues  [L], descending, at most those of A
    lost         0 where A is known exactly
    mean         trace(A) / D, exact
    size         D
    basis        k -> the first k columns of V, [D, k]
    """

    eigenvalues: Tensor
    lost: float
    mean: float
    size: int
    basis: Callable[[int], Tensor]

    @property
    def rank(self) -> int:
        return len(self.eigenvalues)

    def divided_by(self, scale: float) -> Spectrum:
        return self._replace(eigenvalues=self.eigenvalues / scale, lost=self.lost / scale, mean=self.mean / scale)

    def tails(self) -> tuple[Tensor, Tensor]:
        """[L] each, for the ranks k = 1 to L: the least tail with the best bound, and this bound, 4 |A - C|.

        Of the eigenvalues left out let u be the largest and l the smallest. R is within lost / 2 of a multiple of the
        identity, so |A - C| <= max(lost, u + lost - tail, tail - l). With lost = 0 the best tail is the midrange.
        """
        complete = self.rank == self.size
        zero = self.eigenvalues.new_zeros(1)
        upper = torch.cat([self.eigenvalues[1:], zero])
        lower = torch.cat([self.eigenvalues[-1:].expand(self.rank - 1), zero]) if complete else zero
        tail = torch.minimum((upper + lower + self.lost) / 2, upper)
        bound = ((upper - lower + self.lost) / 2).clamp_min(self.lost)
        return tail, 4 * bound

    def rank_within(self, error: float) -> int:
        """The smallest rank whose bound is at most `error`."""
        bounds = self.tails()[1]
        best = f"at least {float(bounds[-1]):.3g}, which is what {self.rank} directions can promise"
        expect(bool(bounds[-1] <= error), "error", best, error)
        return int((bounds > error).sum()) + 1  # the bounds descend


def spectrum_of(images: Tensor | Iterable, rank: int | None, center: bool, whole: bool) -> Spectrum:
    """From one reading of the images: of their covariance if D is small or `whole`, else of their sketch."""
    rows = (x.flatten(1) for x in chunks(images))
    first = next(rows, None)
    expect(first is not None, "images", "at least 2", 0)
    size = first.shape[1]
    expect(rank is None or rank <= size, "rank", f"None or 1 to {size}", rank)
    expect(not whole or size <= WHOLE_LIMIT, "rank", f"one, or an error, for D = {size}", rank)
    rows = itertools.chain([first], rows)
    if whole or size <= COVARIANCE_LIMIT:
        return _decomposed(_covariance(rows, center))
    keep = min(MOST_KEPT, max(1, MOST_BYTES // (24 * size))) if rank is None else max(2 * rank, FEWEST_KEPT)
    return _sketched(rows, Sketch(size, min(keep, size), center, first.device))


def _covariance(rows: Iterable[Tensor], center: bool) -> Tensor:
    """X^T X / (N - 1) [D, D] of the chunks [n, D]; X less its mean where `center`."""
    count, total, square, origin = 0, None, None, None
    for x in rows:
        if total is None:
            total, square = x.new_zeros(x.shape[1]), x.new_zeros(x.shape[1], x.shape[1])
            # accumulated about a point near the mean: no cancellation when that is taken away at the end
            origin = x.mean(0) if center else torch.zeros_like(total)
        x = x - origin
        count, total = count + len(x), total + x.sum(0)
        square.addmm_(x.T, x)
    if center:
        square.addr_(total, total, alpha=-1 / count)
    return square / (count - 1)


def _decomposed(matrix: Tensor) -> Spectrum:
    eigenvalues, vectors = torch.linalg.eigh(matrix)
    eigenvalues, vectors = eigenvalues.flip(0).clamp_min(0), vectors.flip(1)
    mean = float(eigenvalues.mean())
    return Spectrum(eigenvalues, 0.0, mean, len(matrix), lambda k: vectors[:, :k].contiguous())


def _sketched(rows: Iterable[Tensor], sketch: Sketch) -> Spectrum:
    for x in rows:
        sketch.add(x)
    squares, vectors = sketch.spectrum()
    size, count = sketch.rows.shape[1], sketch.count - 1

    def basis(k: int) -> Tensor:
        directions = sketch.rows[: sketch.filled].T @ vectors[:, :k]
        return torch.linalg.qr(directions)[0]  # the light ones are not quite orthogonal: a Gram matrix squares

    return Spectrum(squares[:size] / count, sketch.lost / count, sketch.trace / count / size, size, basis)
