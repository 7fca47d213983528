"""Before anything else: Triton's interpreter where there is no GPU, and uninitialised memory that shows itself."""

import ctypes
import importlib.util
import os
import shutil
import subprocess
from pathlib import Path

if importlib.util.find_spec("triton") and not any(
    os.path.exists(path) for path in ("/proc/driver/nvidia/version", "/dev/nvidiactl")
):
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when triton is imported

os.environ.setdefault("OMP_NUM_THREADS", "1")  # the tests' tensors are small; a test of threads sets its own number

import hypothesis
import pytest
import torch

hypothesis.settings.register_profile("default", max_examples=80, deadline=None, derandomize=True, database=None)
hypothesis.settings.register_profile("thorough", max_examples=3000, deadline=None, database=None)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))


# The files that take longest, to start with: a process that gets one at the end is waited for.
LONGEST = ("test_repulsion", "test_cuda_build", "test_kernels_aot", "test_distributed", "test_resume")


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: LONGEST.index(item.path.stem) if item.path.stem in LONGEST else len(LONGEST))


@pytest.fixture(autouse=True)
def poisoned_memory(monkeypatch):
    """What torch.empty and its kin return is NaN, so that a result that was never written is seen."""
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def fresh_seed():
    torch.manual_seed(20240507)


@pytest.fixture(autouse=True, scope="session")
def fast_layers_at_any_size():
    """The tests' images are so small that an accelerated batch normalisation would leave them to PyTorch."""
    from forde_fast.second_order.layers import BatchNorm

    BatchNorm.smallest = 0


@pytest.fixture(scope="session")
def compiled_on_host(tmp_path_factory):
    """tests/NAME_on_host.cpp as a library of ctypes, by its NAME."""

    def compiled(name: str) -> ctypes.CDLL:
        if shutil.which("g++") is None:
            pytest.skip("needs g++")
        path = tmp_path_factory.mktemp(name) / f"{name}.so"
        flags = ["-std=c++17", "-O1", "-ffp-contract=off", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC"]
        source = Path(__file__).with_name(f"{name}_on_host.cpp")
        subprocess.run(["g++", *flags, "-o", path, source], check=True)
        return ctypes.CDLL(path)

    return compiled


@pytest.fixture(params=["portable", "avx2", "avx512"])
def capability(request):
    """Every instruction set that this machine can run, not the widest alone."""
    _C = pytest.importorskip("forde_fast._C")
    widest = _C.cpu_capability()
    try:
        _C.use_cpu_capability(request.param)
    except ValueError as error:
        pytest.skip(str(error))
    yield request.param
    _C.use_cpu_capability(widest)


@pytest.fixture(scope="module")
def one_thread():
    """In small networks, threads only wait for each other: on a busy machine for minutes."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def threads_come_back():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)
