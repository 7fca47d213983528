"""What is installed here, as `forde-fast info` and the benchmarks' rows say it."""

from __future__ import annotations

import importlib.metadata
import platform

import torch

from forde_fast.operators import UNUSABLE
from forde_fast.repulsion import available_backends


def info() -> dict[str, str]:
    """Versions, hardware and backends, each as text."""
    return {
        "forde_fast": _version("forde-fast"),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "cpu": f"{_cpu()}, {torch.get_num_threads()} threads",
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
        "C++ kernels": _cpp(),
        **{f"backend {name}": str(backend) for name, backend in available_backends().items()},
    }


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _cpp() -> str:
    if UNUSABLE["cpp"]:
        return "not built: install a C++ compiler, then install this package again without build isolation"
    from forde_fast import _C

    return f"built, using {_C.cpu_capability()}"


def _cpu() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            return next(line.split(":", 1)[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
