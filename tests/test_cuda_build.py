"""What the compiler makes of the CUDA C++ sources for GPUs that are not here: no warnings, no spills."""

import re
import runpy
import shutil
import subprocess
import sysconfig
from collections import Counter
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
NVCC = shutil.which("nvcc") or "/usr/local/cuda/bin/nvcc"
# Of a thread, by the kernel's size: 384 of them share 65536, or 512; else 256.
MOST_REGISTERS = {"10": 168, "128": 128, "256": 128}
pytestmark = pytest.mark.skipif(not Path(NVCC).exists(), reason="needs nvcc")


def setup_list(name):
    """A list of strings that setup.py assigns to a name."""
    setup = (ROOT / "setup.py").read_text()
    return re.findall(r'"([^"]*)"', re.search(rf"^{name} = \[(.*?)\]", setup, re.M | re.S)[1])


def test_every_kernel_for_every_chip(tmp_path):
    flags = [*setup_list("NVCC_FLAGS"), *setup_list("EVERY_GPU"), "-std=c++17", "-Xptxas", "-v,-warn-spills"]
    sources = list((ROOT / "csrc/cuda").glob("*.cu"))
    command = [NVCC, *flags, "-c", *sources, "-odir", tmp_path]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "are serialized" not in done.stdout + done.stderr  # products that wait for each other
    report = (done.stdout + done.stderr).split("Compiling entry function")[1:]
    found = Counter()
    for text in report:
        chip, size = re.search(r"for '(sm_\w+)'", text)[1], re.search(r"Li(\d+)E", text)[1]
        registers = int(re.search(r"Used (\d+) registers", text)[1])
        print(chip, text.split("'")[1], registers, "registers")
        assert "0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads" in text, text
        assert registers <= MOST_REGISTERS.get(size, 255), text
        # else it would be the trap that is compiled where the matrix units' instructions are not
        assert (registers > 100) == (chip == "sm_90a") or "low_rank" not in text, text
        assert "smem" not in text, text  # all of it is dynamic: the launcher's plan bounds it
        found[chip] += 1
    assert found == dict.fromkeys(("sm_80", "sm_90a", "sm_100"), 12)


@pytest.mark.parametrize(
    ("listed", "expected"),
    [
        ("9.0", ["90a,sm_90a"]),
        ("8.0;9.0+PTX", ["80,sm_80", "90a,sm_90a", "90,compute_90"]),
        ("9.0a 9.0 10.0f+PTX", ["90a,sm_90a", "100f,sm_100f", "100f,compute_100f"]),
        ("Hopper", []),  # torch knows what that is
    ],
)
def test_hopper_gets_its_own_instructions(listed, expected, monkeypatch):
    monkeypatch.setenv("FORDE_FAST_BUILD", "0")
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", listed)
    monkeypatch.setattr("setuptools.setup", lambda **arguments: None)
    flags = runpy.run_path(ROOT / "setup.py")["targets"](torch)
    assert flags == ["-gencode=arch=compute_" + chip.replace(",", ",code=") for chip in expected]


def test_the_binding_is_valid_cxx(tmp_path):
    """Against the headers alone: a CPU build of torch lacks the libraries, and one header that its build writes."""
    torch_headers = Path(torch.__file__).parent / "include"
    stand_in = tmp_path / "c10/cuda/impl/cuda_cmake_macros.h"
    stand_in.parent.mkdir(parents=True)
    stand_in.touch()
    system = [torch_headers, torch_headers / "torch/csrc/api/include", sysconfig.get_path("include")]
    system += [Path(NVCC).resolve().parents[1] / "include", "/usr/local/cuda/include"]
    includes = [word for path in system for word in ("-isystem", path)] + ["-idirafter", tmp_path]
    for source in (ROOT / "csrc/cuda").glob("*.cpp"):
        flags = ["-std=c++20", "-fsyntax-only", "-Wall", "-Wextra", "-Werror", "-Wno-unused-parameter"]
        done = subprocess.run(["g++", *flags, *includes, source], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
