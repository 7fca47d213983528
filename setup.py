"""Builds the package, and its C++ extension where a compiler and torch are at hand.

FORDE_FAST_BUILD=0 skips the extension, FORDE_FAST_BUILD=1 makes a failed build an error. Without either a
failed build leaves a working package: `forde-fast info` then says what is missing.
"""

import os
import sys
from pathlib import Path

from setuptools import find_packages, setup

BUILD = os.environ.get("FORDE_FAST_BUILD", "auto")


def extension():
    """The setup() arguments that build forde_fast._C; empty, with a line on stderr, where it cannot be built."""
    if BUILD == "0":
        return {}
    try:
        from torch.utils.cpp_extension import CUDA_HOME, BuildExtension, CppExtension, CUDAExtension
        from torch.version import cuda as torch_cuda
    except ImportError as error:
        if BUILD == "1":
            raise
        print(f"forde_fast: no C++ extension, torch is not importable here ({error})", file=sys.stderr)
        return {}

    class OptionalBuild(BuildExtension):
        """torch's BuildExtension raises RuntimeError without a compiler, which `optional=True` does not catch."""

        def run(self):
            try:
                super().run()
            except Exception as error:
                if BUILD == "1":
                    raise
                print(f"forde_fast: the C++ extension was not built: {error}", file=sys.stderr)

    sources = sorted(map(str, Path("csrc").glob("*.cpp"))) + sorted(map(str, Path("csrc/cpu").glob("*.cpp")))
    cuda_sources = sorted(map(str, Path("csrc/cuda").glob("*.cu")))
    kind = CppExtension
    if cuda_sources and torch_cuda and CUDA_HOME:
        kind, sources = CUDAExtension, sources + cuda_sources
    flags = ["-O3", "-Wall", "-fvisibility=hidden", "-fopenmp"]
    return {
        "ext_modules": [kind("forde_fast._C", sources, extra_compile_args={"cxx": flags, "nvcc": ["-O3"]})],
        "cmdclass": {"build_ext": OptionalBuild},
    }


setup(
    packages=[*find_packages(include=["forde_fast", "forde_fast.*"]), "forde_fast.kernels"],
    package_dir={"forde_fast.kernels": "kernels"},
    **extension(),
)
