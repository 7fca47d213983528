"""Builds the package, its C++ extension where a compiler and torch are at hand, and the CUDA one beside nvcc.

FORDE_FAST_BUILD=0 skips the extensions, FORDE_FAST_BUILD=1 makes a failed build an error. Without either a
failed build leaves a working package: `forde-fast info` then says what is missing.
"""

import os
import re
import sys
from pathlib import Path

from setuptools import find_packages, setup

BUILD = os.environ.get("FORDE_FAST_BUILD", "auto")


CXX_FLAGS = ["-O3", "-g0", "-Wall", "-fvisibility=hidden"]  # Python's own flags have -g
# fused_kernel.h says why multiplications and additions are not contracted.
NVCC_FLAGS = ["-O3", "-fmad=false", "--expt-relaxed-constexpr", "-Werror", "all-warnings"]
# Hopper's matrix units have instructions of their own (low_rank_block.h), which only "90a" has.
EVERY_GPU = [
    "-gencode=arch=compute_80,code=sm_80",
    "-gencode=arch=compute_80,code=compute_80",
    "-gencode=arch=compute_90a,code=sm_90a",
    "-gencode=arch=compute_100,code=sm_100",
]


def extensions():
    """The setup() arguments that build the extensions; empty, with a line on stderr, where none can be built."""
    if BUILD == "0":
        return {}
    try:
        from torch.utils.cpp_extension import BuildExtension, CppExtension
    except ImportError as error:
        if BUILD == "1":
            raise
        print(f"forde_fast: no C++ extension, torch is not importable here ({error})", file=sys.stderr)
        return {}

    class OptionalBuild(BuildExtension):
        """torch raises RuntimeError where a build fails, which `optional=True` does not catch."""

        def run(self):
            self.tolerate(super().run, "no extension was")

        def build_extension(self, extension):
            self.tolerate(lambda: super(OptionalBuild, self).build_extension(extension), f"{extension.name} was not")

        def tolerate(self, build, what):
            try:
                build()
            except Exception as error:
                if BUILD == "1":
                    raise
                print(f"forde_fast: {what} built: {error}", file=sys.stderr)

    sources = sorted(map(str, Path("csrc/cpu").glob("*.cpp")))
    sources.sort(key=lambda path: "repulsion_" not in path)  # what takes longest to compile is not left for the end
    flags = {"cxx": [*CXX_FLAGS, "-fopenmp"]}
    modules = [CppExtension("forde_fast._C", sources, extra_compile_args=flags, optional=True), *cuda_extension()]
    return {"ext_modules": modules, "cmdclass": {"build_ext": OptionalBuild}}


def cuda_extension():
    """[forde_fast._cuda] where nvcc and a CUDA build of torch are: for the GPUs that are here or that
    TORCH_CUDA_ARCH_LIST names, for every supported one where there are none."""
    import torch
    from torch.utils.cpp_extension import CUDA_HOME, CUDAExtension

    if not (torch.version.cuda and CUDA_HOME and Path(CUDA_HOME, "bin", "nvcc").exists()):
        return []
    chips = targets(torch)
    low_rank = ["-DFORDE_FAST_LOW_RANK"] if any("sm_90a" in chip for chip in chips) else []
    flags = {"cxx": CXX_FLAGS + low_rank, "nvcc": NVCC_FLAGS + chips}
    sources = sorted(str(path) for path in Path("csrc/cuda").iterdir() if path.suffix in (".cpp", ".cu"))
    return [CUDAExtension("forde_fast._cuda", sources, extra_compile_args=flags, optional=True)]


def targets(torch):
    """What nvcc compiles for; nothing where TORCH_CUDA_ARCH_LIST says it in words, which torch knows."""
    if listed := os.environ.get("TORCH_CUDA_ARCH_LIST"):
        return named_targets(listed)
    if not torch.cuda.is_available():
        return EVERY_GPU
    here = {torch.cuda.get_device_capability(n) for n in range(torch.cuda.device_count())}
    chips = sorted(f"{major}{minor}{'a' if major == 9 else ''}" for major, minor in here)
    return [f"-gencode=arch=compute_{chip},code=sm_{chip}" for chip in chips]


def named_targets(listed):
    """The flags for TORCH_CUDA_ARCH_LIST, in which 9.0 is 9.0a: torch itself would leave Hopper without the kernel
    for low ranks. Code for later GPUs (+PTX) cannot have what only 9.0a has."""
    names = [re.fullmatch(r"(\d+)\.(\d)([af]?)(\+PTX)?", name) for name in listed.replace(";", " ").split()]
    if not all(names):
        return []
    flags = []
    for major, minor, suffix, later in (name.groups() for name in names):
        chip = f"{major}{minor}"
        own = chip + (suffix or ("a" if chip == "90" else ""))
        flags.append(f"-gencode=arch=compute_{own},code=sm_{own}")
        if later:
            flags.append(f"-gencode=arch=compute_{chip + suffix},code=compute_{chip + suffix}")
    return list(dict.fromkeys(flags))


setup(
    packages=[*find_packages(include=["forde_fast", "forde_fast.*"]), "forde_fast.kernels"],
    package_dir={"forde_fast.kernels": "kernels"},
    **extensions(),
)
