"""Batches from a training set that lies on the device as a whole: nothing is copied to it between steps."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch

from forde_fast.validation import expect, whole


class Loader:
    """Iterate over shuffled, optionally augmented batches (x [B, C, H, W] or features [B, F], y [B]).

    Each `for` over the loader is one epoch and advances `epoch` when it begins. Order and augmentation of an
    epoch depend on (seed, epoch) alone and are drawn on the CPU, so every device gets the same ones; to
    resume, set `epoch`.

    Args:
        images: floating [N, C, H, W], or without augmentation [N, F], normalised, on the device that trains.
        labels: [N], on the same device.
        batch_size: at most so many samples; if the set is smaller, one batch holds all of it.
        shuffle: draw a new order each epoch.
        drop_last: leave out the last batch if it is smaller than the others.
        augment: crop at a random place after adding a border, and flip left to right half of the time. The
            border holds each channel's smallest value: black, as when the crop came before the normalisation.
        padding: width of that border in pixels.
        seed: a non-negative integer.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, an empty set, a number not whole or too small.
    """

    def __init__(
        self,
        images: torch.Tensor,
        labels: torch.Tensor,
        batch_size: int = 128,
        shuffle: bool = True,
        drop_last: bool = True,
        augment: bool = False,
        padding: int = 4,
        seed: int = 0,
    ) -> None:
        good = images.ndim in ((4,) if augment else (2, 4)) and images.is_floating_point() and images.numel()
        expect(good, "images", "floating [N, C, H, W], not empty", f"{images.dtype} {list(images.shape)}")
        alike = labels.shape == images.shape[:1]
        expect(alike, "labels", f"[{len(images)}], one label per image", list(labels.shape))
        expect(labels.device == images.device, "labels", f"on {images.device}, with the images", labels.device)
        for name, value, least in (("batch_size", batch_size, 1), ("padding", padding, 0), ("seed", seed, 0)):
            whole(value, name, least)
        self.images, self.labels = images, labels
        self.batch_size = min(batch_size, len(images))
        self.shuffle, self.drop_last, self.augment = shuffle, drop_last, augment
        self.padding, self.seed, self.epoch = padding, seed, 0
        self._border = images.amin(dim=(0, 2, 3)) if augment else None

    def __len__(self) -> int:
        """Batches per epoch."""
        whole, rest = divmod(len(self.images), self.batch_size)
        return whole if self.drop_last or not rest else whole + 1

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        epoch, self.epoch = self.epoch, self.epoch + 1
        return self._batches(epoch)

    def _batches(self, epoch: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        n, device = len(self.images), self.images.device
        # torch's CPU generator reads 32 bits of its seed: mix both numbers into those.
        mixed = int(np.random.SeedSequence([self.seed, epoch]).generate_state(1)[0])
        generator = torch.Generator().manual_seed(mixed)
        order = torch.randperm(n, generator=generator) if self.shuffle else torch.arange(n)
        order = order.to(device)
        if self.augment:  # a whole epoch's draws at once: one small copy, no synchronisation between steps
            corners = torch.randint(-self.padding, self.padding + 1, (n, 2), generator=generator).to(device)
            flips = torch.randint(2, (n,), generator=generator, dtype=torch.bool).to(device)
        for start in range(0, len(self) * self.batch_size, self.batch_size):
            part = slice(start, start + self.batch_size)
            picked = order[part]
            if self.augment:
                x = crop_and_flip(self.images, picked, corners[part], flips[part], self._border)
            else:
                x = self.images[picked]
            yield x, self.labels[picked]


def crop_and_flip(
    images: torch.Tensor,  # [N, C, H, W]
    picked: torch.Tensor,  # [B] int64, which images
    corners: torch.Tensor,  # [B, 2] int64, top and left of each window, may lie outside
    flips: torch.Tensor,  # [B] bool
    border: torch.Tensor,  # [C], what a window holds outside the image
) -> torch.Tensor:  # [B, C, H, W]
    """Windows of the images' own size at their corners, flipped left to right where asked, in one gather."""
    _, channels, height, width = images.shape
    across = torch.arange(width, device=images.device)
    columns = corners[:, 1:] + torch.where(flips[:, None], width - 1 - across, across)  # [B, W]
    rows = corners[:, :1] + torch.arange(height, device=images.device)  # [B, H]
    windows = images[
        picked[:, None, None, None],
        torch.arange(channels, device=images.device)[:, None, None],
        rows.clamp(0, height - 1)[:, None, :, None],
        columns.clamp(0, width - 1)[:, None, None, :],
    ]
    inside = ((rows >= 0) & (rows < height))[:, :, None] & ((columns >= 0) & (columns < width))[:, None, :]
    return torch.where(inside[:, None], windows, border[:, None, None])
