"""The heaviest directions of a covariance that is too large to exist."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from forde_fast.lengthscales.streams import CHUNK


class Sketch:
    """The heaviest directions of a scatter matrix sum (x - mean)(x - mean)^T = B^T B + R, where 0 <= R <= lost I.

    B [rows, D] holds at most 3 `keep` + 1 rows. When they are full, the `keep` heaviest singular directions of B stay
    and the largest weight of those that go is added to `lost`: this bounds R, whatever the images and their order.
    As long as they are not full, nothing is lost and all is exact. This is Frequent Directions (Liberty, KDD 2013)
    without its shrinking of the rows that stay, with the merging of means of Ross et al. (IJCV 2008).
    """

    def __init__(self, size: int, keep: int, center: bool, device):
        self.keep, self.center = keep, center
        self.rows = torch.empty(3 * keep + 1, size, dtype=torch.float64, device=device)
        self.old = self.filled = 0  # rows that stand for what came before the last compression; rows in use
        self.mean = self.rows.new_zeros(size)
        self.count, self.trace, self.lost = 0, 0.0, 0.0

    def add(self, x: Tensor) -> None:
        """Images [n, D]."""
        while len(x):
            if self.filled >= len(self.rows) - 1:  # one is left for the mean
                self._compress()
            room = len(self.rows) - 1 - self.filled
            self.rows[self.filled : self.filled + len(x[:room])] = x[:room]
            self.filled += len(x[:room])
            x = x[room:]

    def spectrum(self) -> tuple[Tensor, Tensor]:
        """Squared singular values of B, descending, and its left singular vectors [rows, rows]: B^T v is U sigma."""
        self._merge_mean()
        rows = self.rows[: self.filled]
        gram = rows @ rows.T
        self.trace += float(gram.diagonal()[self.old :].sum())
        self.old = self.filled
        values, vectors = torch.linalg.eigh(gram)
        return values.flip(0).clamp_min(0), vectors.flip(1)

    def _compress(self) -> None:
        values, vectors = self.spectrum()
        self.lost += float(values[self.keep])
        mix = vectors[:, : self.keep].T
        for columns in self.rows[: self.filled].split(max(1, CHUNK // self.filled), dim=1):
            columns[: self.keep] = mix @ columns
        self.old = self.filled = self.keep

    def _merge_mean(self) -> None:
        """Centre the rows that are new; one more row stands for the distance of their mean from the others'."""
        new = self.rows[self.old : self.filled]
        before, self.count = self.count, self.count + len(new)
        if not self.center or len(new) == 0:
            return
        mean = new.mean(0)
        new -= mean
        shift = mean - self.mean
        self.mean += shift * (len(new) / self.count)
        if before:
            self.rows[self.filled] = shift * math.sqrt(before * len(new) / self.count)
            self.filled += 1
