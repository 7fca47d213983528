"""Corrupted copies of a test set, made once for all runs and kept in a folder."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from forde_fast.data.corrupted import SEVERITIES
from forde_fast.data.corruptions import CORRUPTIONS, corrupt
from forde_fast.files import write
from forde_fast.validation import expect


class Corrupted:
    """(name, severity, images, labels) of uint8 images under some corruptions, from files `<folder>/<name>.npy`.

    spread  each image at one severity only, the five in turn; without it the files are laid out as CIFAR-10-C's
    """

    def __init__(self, folder: Path, images: Tensor, labels: Tensor, names=CORRUPTIONS, preset: str = "cifar",
                 spread: bool = False, seed: int = 0):  # fmt: skip
        self.folder, self.images, self.labels = folder, images.numpy(), labels.numpy()
        self.names, self.preset, self.spread, self.seed = tuple(names), preset, spread, seed

    def __iter__(self) -> Iterator[tuple[str, int, Tensor, Tensor]]:
        for name in self.names:
            made = self._made(name)
            start = 0
            for severity in SEVERITIES:
                labels = self.labels[self._of(severity)]
                images = np.array(made[start : start + len(labels)])
                start += len(labels)
                yield name, severity, torch.from_numpy(images), torch.from_numpy(labels)

    def _of(self, severity: int) -> slice:
        return slice(severity - 1, None, len(SEVERITIES)) if self.spread else slice(None)

    def _made(self, name: str) -> np.ndarray:
        path = self.folder / f"{name}.npy"
        if not path.exists():
            parts = [corrupt(self.images[self._of(s)], name, s, self.seed, self.preset) for s in SEVERITIES]
            content = io.BytesIO()
            np.save(content, np.concatenate(parts), allow_pickle=False)
            self.folder.mkdir(parents=True, exist_ok=True)
            write(path, content.getvalue())
        made = np.load(path, mmap_mode="r", allow_pickle=False)
        wanted = (len(self.images) * (1 if self.spread else len(SEVERITIES)), *self.images.shape[1:])
        expect(made.shape == wanted, str(path), f"copies {wanted} of the images", f"{made.shape}, of others")
        return made
