"""What is timed: shapes, lengthscales, and what is asked of the fast backends."""

from __future__ import annotations

from typing import NamedTuple

import torch

from forde_fast.lengthscales import PCA, Cosine
from forde_fast.validation import expect, names_in, one_of

Shape = tuple[int, int, int]  # M, B, D

SHAPES: dict[str, Shape] = {
    "digits": (10, 128, 64),
    "fashion": (10, 128, 784),
    "cifar": (10, 128, 3072),
    "tinyimagenet": (10, 128, 12288),
    "imagenet": (10, 256, 150528),
    "weights": (10, 1, 11_173_962),  # of a ResNet18
}
IMAGES = {64: (1, 8, 8), 784: (1, 28, 28), 3072: (3, 32, 32), 12288: (3, 64, 64), 150528: (3, 224, 224)}  # by D
GROUPS = {
    "all": tuple(SHAPES),
    "sweep-M": tuple(f"{m}x128x3072" for m in (2, 3, 5, 10, 20, 50, 128)),
    "sweep-B": tuple(f"10x{b}x3072" for b in (1, 8, 32, 128, 512)),
    "sweep-D": tuple(f"10x128x{d}" for d in (64, 192, 784, 3072, 12288)),
}
DEFAULT_SHAPES = "digits,cifar,weights"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}

# The most that value and gradient should take: in units of the floor, or in ms on an H200 with cold cache.
TARGETS = {
    ("cpu", "pca", SHAPES["cifar"]): ("ratio", 1.0),
    ("cpu", "rank256", SHAPES["cifar"]): ("ratio", 1.25),
    ("cpu", "identity", SHAPES["cifar"]): ("ratio", 2.0),
    ("cpu", "identity", SHAPES["weights"]): ("ratio", 1.5),
    ("cuda", "pca", SHAPES["cifar"]): ("ratio", 1.5),
    ("cuda", "rank256", SHAPES["cifar"]): ("ms", 0.030),
    ("cuda", "rank256", SHAPES["tinyimagenet"]): ("ratio", 1.5),
    ("cuda", "rank256", SHAPES["imagenet"]): ("ms", 1.625),
    ("cuda", "identity", SHAPES["weights"]): ("ratio", 1.3),
}

# On a GPU, how many times faster than plain PyTorch, as it is and compiled, at the shape of CIFAR.
SPEEDUPS = {
    "identity": {"reference": 20, "compiled": 3},
    "pca": {"reference": 5, "compiled": 3},
    "rank256": {"reference": 20, "compiled": 3},
}

FULL_BASIS = {"cpu": 4096, "cuda": 16384}  # the largest D whose D x D basis is made without being asked for


class Case(NamedTuple):
    shape: Shape
    lengthscale: str  # "identity", "pca" (of full rank), "rankK" or "cosine"
    device: str = "cpu"
    dtype: str = "float32"
    precision: str = "ieee"  # of products of float32 matrices: "ieee" or "tf32"

    @property
    def rank(self) -> int:
        """Columns of the basis: 0 where there is none."""
        kind = self.lengthscale
        return int(kind[4:]) if kind.startswith("rank") else self.shape[2] if kind == "pca" else 0


def make_cases(shapes: str, lengthscales: str | None, device: str, dtype: str, precision: str) -> list[Case]:
    """The cases of a selection, as `bench` describes it; ValueError says what is not known."""
    one_of(dtype, "dtype", DTYPES)
    one_of(precision, "precision", ("ieee", "tf32"))
    expect(device == "cpu" or torch.cuda.is_available(), "device", "cpu, as there is no CUDA device", device)
    expect(precision == "ieee" or device == "cuda", "precision", "ieee on a CPU", precision)
    cases = []
    for shape in (_shape(name) for given in names_in(shapes) for name in GROUPS.get(given, (given,))):
        for kind in names_in(lengthscales) if lengthscales else _that_suit(shape[2], device):
            _check_lengthscale(kind, shape[2])
            cases.append(Case(shape, kind, device, dtype, precision))
    return list(dict.fromkeys(cases))


def _shape(name: str) -> Shape:
    if name in SHAPES:
        return SHAPES[name]
    sizes = name.split("x")
    good = len(sizes) == 3 and all(size.isdecimal() and int(size) > 0 for size in sizes) and int(sizes[0]) > 1
    expect(good, "shapes", f"MxBxD with M > 1, or one of {', '.join((*SHAPES, *GROUPS))}", repr(name))
    return tuple(map(int, sizes))


def _that_suit(size: int, device: str) -> list[str]:
    kinds = {"identity": True, "pca": size <= FULL_BASIS[device], "rank256": 2 * 256 <= size <= 2**20}
    return [kind for kind, suits in kinds.items() if suits]


def _check_lengthscale(kind: str, size: int) -> None:
    rank = kind.removeprefix("rank")
    known = kind in ("identity", "pca", "cosine") or rank.isdecimal()
    expect(known, "lengthscales", "identity, pca, rankK or cosine", repr(kind))
    # with more columns one product with C is fewer operations than two thin ones, and that is "pca"
    low = not rank.isdecimal() or 1 <= int(rank) <= size // 2
    expect(low, "lengthscales", f"a rank from 1 to D / 2 = {size // 2}", kind)
    image = kind != "cosine" or size in IMAGES
    expect(image, "lengthscales", f"cosine only with D of {', '.join(map(str, IMAGES))}", f"D = {size}")


def make_lengthscale(case: Case) -> PCA | Cosine | None:
    """Weights from 100 down to 0.01, as images have, along a random orthonormal basis on the case's device or along
    the cosines."""
    size, rank = case.shape[2], case.rank
    weights = torch.logspace(2, -2, size, dtype=torch.float64, device=case.device)
    if case.lengthscale == "cosine":
        return Cosine(weights.view(IMAGES[size]))
    if rank == 0:
        return None
    basis = torch.linalg.qr(torch.randn(size, rank, dtype=torch.float64, device=case.device))[0]
    tail = float(weights[rank] + weights[-1]) / 2 if rank < size else 0.0
    return PCA(basis, weights[:rank], tail)
