"""The operation against its floor and against plain PyTorch: verified first, then timed.

    python bench/repulsion.py [--device cuda] [--rounds 15] [--out FOLDER]

Floors: for the identity, reading the input once and writing a fresh output of its size (a clone); for a
lengthscale, the library's own matrix product of the M B rows with C, or the two thin ones.
"""

import sys

import torch
from timing import append, interleaved, options, quantiles, ratio

import forde_fast as ff
from forde_fast.lengthscales import Identity
from forde_fast.testing import compare

SHAPES = [(10, 128, 192), (10, 128, 784), (2, 128, 3072), (10, 128, 3072), (50, 32, 3072)]


def lengthscales(size: int) -> dict:
    basis = torch.linalg.qr(torch.randn(size, size))[0]
    values = torch.logspace(2, -2, size)
    thin = min(256, size // 4)
    tail = float(values[thin] + values[-1]) / 2
    return {
        "identity": Identity(),
        "pca": ff.PCA(basis, values),
        f"rank {thin}": ff.PCA(basis[:, :thin], values[:thin], tail),
    }


def measure(shape, name, scale, device, rounds) -> list[dict]:
    members, batch, size = shape
    particles = torch.randn(shape, device=device)
    rows = particles.view(-1, size)
    floor = particles.clone if name == "identity" else (lambda: scale.product(rows))
    backends = {"reference": 0} | {backend: 0 for backend in (("cpp",) if device == "cpu" else ("triton",))}
    for backend in list(backends)[1:]:
        errors = compare(backend, "random", (members, 2, size), torch.float32, scale, draws=2, device=device)
        bad = [f"{what} {e}" for what, e in errors.items() if not e.within]
        if bad:
            raise SystemExit(f"{backend} at {shape}, {name}: not timed, its numbers are wrong: {'; '.join(bad)}")
    calls = {"floor": floor}
    for backend in backends:
        if backend == "reference" and members * members * batch * size > 2e8:
            continue  # it holds [M, M, B, D] several times
        calls[backend] = lambda b=backend: ff.repulsion(particles, scale, backend=b)
    times = interleaved(calls, rounds, device)
    table = []
    for backend in list(calls)[1:]:
        low, middle, high = (1e3 * t for t in quantiles(times[backend]))
        table.append({
            "provider": backend, "M": members, "B": batch, "D": size, "lengthscale": name, "dtype": "float32",
            "ms": round(middle, 4), "ms_20": round(low, 4), "ms_80": round(high, 4),
            "floor_ms": round(1e3 * quantiles(times["floor"])[1], 4),
            "ratio": round(ratio(times[backend], times["floor"]), 3),
        })  # fmt: skip
    return table


def main() -> int:
    given = options(__doc__, rounds=15)
    torch.manual_seed(0)
    table = []
    for shape in SHAPES:
        for name, scale in lengthscales(shape[2]).items():
            for row in measure(shape, name, scale, given.device, given.rounds):
                table.append(row)
                print("{provider:10} {M:3} {B:4} {D:6} {lengthscale:9} {ms:9.3f} ms   floor {floor_ms:9.3f} ms   "
                      "ratio {ratio:6.2f}".format(**row), flush=True)  # fmt: skip
    print(append("repulsion", table, given.out))
    return 0


if __name__ == "__main__":
    sys.exit(main())
