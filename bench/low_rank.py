"""The CUDA C++ kernel for low ranks as several source trees have it, in turn in one process: which changes pay.

    python bench/low_rank.py [--shapes 10x128x3072,10x128x12288] [--rounds 60] TREE [TREE ...]
    python bench/low_rank.py --build TREE [TREE ...]    # only that, where there is no GPU

TREE is a folder that holds csrc: `.`, or what `git archive COMMIT csrc | tar -x -C TREE` makes. nvcc builds each for
Hopper, as TREE/low_rank.so, unless that is newer than the sources. The basis has rank 256 and a tail. As in
`forde-fast bench`, what is beyond its error budget is not timed, and times are of a CUDA graph. Eight trees take some
10 seconds: prefer one such sitting to eight, which differ by as much as what is looked for.
"""

from __future__ import annotations

import argparse
import ctypes
import subprocess
import tempfile
from pathlib import Path

import torch
from timing import interleaved, quantiles

from forde_fast import operators
from forde_fast.benchmark.cases import make_cases, make_lengthscale
from forde_fast.benchmark.providers import check
from forde_fast.precision import products_in
from forde_fast.repulsion import DEFAULT, _half_factor
from forde_fast.timing import captured
from forde_fast.types import Repulsion

FLAGS = ("-O3", "-fmad=false", "--expt-relaxed-constexpr", "-std=c++17", "-gencode=arch=compute_90a,code=sm_90a")
LIBRARY = ("-shared", "-Xcompiler=-fPIC", "-cudart=static")
ENTRY = """
#include "csrc/cuda/low_rank.cu"
// Pointers, numbers and factors in the order of LowRank. Without a workspace: how large it is, or less than 0.
extern "C" long long low_rank(void* const* at, const long long* n, const double* x, void* stream) {
  using namespace forde_fast;
  const LowRank f = {(const float*)at[0], at[1], (float*)at[2], (float*)at[3], (float*)at[4], (float*)at[5],
                     (char*)at[6], n[0], n[1], n[2], n[3], int(n[4]), int(n[5]), x[0], x[1], x[2], x[3]};
  LowRankPlan p;
  int device = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) error = plan_low_rank(f, device, &p);
  if (error == cudaSuccess && !f.workspace) return p.at.size;
  if (error == cudaSuccess) error = launch_low_rank(f, p, static_cast<cudaStream_t>(stream));
  return -static_cast<long long>(error);
}
"""


def build(tree: Path) -> Path:
    """TREE/low_rank.so; CalledProcessError if nvcc fails."""
    library = tree / "low_rank.so"
    newest = max(path.stat().st_mtime for path in (tree / "csrc").rglob("*") if path.is_file())
    if not library.exists() or library.stat().st_mtime < newest:
        with tempfile.TemporaryDirectory() as folder:
            entry = Path(folder) / "entry.cu"
            entry.write_text(ENTRY)
            includes = (f"-I{tree}", f"-I{tree / 'csrc/cuda'}")
            subprocess.run(["nvcc", *FLAGS, *LIBRARY, *includes, "-o", library, entry], check=True)
    return library


def make_call(library: Path, particles: torch.Tensor, factor: torch.Tensor, unit: float, tail: float):
    """() -> Repulsion, in memory of its own that every call writes again. RuntimeError names CUDA's error."""
    kernel = ctypes.CDLL(str(library.resolve())).low_rank
    kernel.restype = ctypes.c_longlong
    (members, batch, size), rank = particles.shape, 8 * factor.shape[1]
    sizes = (members, batch, size), (), (members, batch), (members, members, batch)
    gradient, value, h, d = (particles.new_empty(shape) for shape in sizes)
    numbers = (ctypes.c_longlong * 6)(batch, size, particles.stride(0), particles.stride(1), members, rank)
    factors = (ctypes.c_double * 4)(unit, tail, 1e-24, DEFAULT.log_count(members))
    tensors = [particles, factor, gradient, value, h, d]

    def launch() -> int:
        at = (ctypes.c_void_p * 7)(*(x.data_ptr() for x in tensors))
        done = kernel(at, numbers, factors, ctypes.c_void_p(torch.cuda.current_stream().cuda_stream))
        if done < 0:
            raise RuntimeError(f"{library}: CUDA's error {-done}")
        return done

    tensors.append(particles.new_empty(launch(), dtype=torch.uint8))

    def call() -> Repulsion:
        launch()
        return Repulsion(value, gradient, h, d)

    return call


def compare(libraries: dict[str, Path], case, rounds: int) -> None:
    torch.manual_seed(0)
    particles, scale, calls = torch.randn(case.shape, device="cuda"), make_lengthscale(case), {}
    half = _half_factor(particles, scale, True, "tf32")
    if half is None:
        raise SystemExit(f"{case.shape}: not a shape of this kernel, or not a GPU of the Hopper generation")
    print(*case.shape, sep=" x ")
    with products_in("tf32"):
        for name, library in libraries.items():
            call = make_call(library, particles, *half)
            wrong = check(call(), particles, scale)
            if wrong:
                print(f"  {name}: WRONG, not timed:", "; ".join(wrong))
            else:
                calls[name] = captured(call)
    for cache in ("cold", "warm"):
        for name, times in interleaved(calls, rounds, "cuda", cache).items():
            low, middle, high = (1e6 * t for t in quantiles(times))
            print(f"  {cache} {middle:9.2f} us ({low:.2f} to {high:.2f})  {name}", flush=True)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("trees", nargs="+", type=Path, metavar="TREE")
    parser.add_argument("--shapes", default="cifar,tinyimagenet")
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--build", action="store_true", help="only build")
    given = parser.parse_args(arguments)
    for tree in given.trees:
        if not (tree / "csrc/cuda/low_rank.cu").exists():
            parser.error(f"TREE: expected a folder with csrc/cuda/low_rank.cu, got {tree}")
    if not given.build and not torch.cuda.is_available():
        parser.error("needs a CUDA device; --build does not")
    operators.HAS_LOW_RANK = True  # in the libraries, whatever is installed
    libraries = {str(tree): build(tree) for tree in given.trees}
    if not given.build:
        for case in make_cases(given.shapes, "rank256", "cuda", "float32", "tf32"):
            compare(libraries, case, given.rounds)


if __name__ == "__main__":
    main()
