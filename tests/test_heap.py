"""What a process keeps of the memory that it frees, and that others' settings stay."""

import json
import os
import subprocess
import sys

import pytest

from forde_fast import heap

pytestmark = pytest.mark.skipif(heap._glibc() is None, reason="needs glibc")
PROCESS = f"""
import ctypes, json, resource, runpy
from pathlib import Path

heap = runpy.run_path({heap.__file__!r})
library = ctypes.CDLL(None)
library.malloc.restype, library.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
library.free.argtypes = [ctypes.c_void_p]

def use():  # 64 MiB; returns how many of its pages were not there
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    block = library.malloc(64 * 2**20)
    ctypes.memset(block, 1, 64 * 2**20)
    library.free(block)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

def resident():
    return int(Path("/proc/self/statm").read_text().split()[1])

found = {{"first": use(), "again": use(), "kept": heap["keep"](), "then": use(), "later": use()}}
found["before"] = resident()
heap["trim"]()
found["after"] = resident()
print(json.dumps(found))
"""


@pytest.mark.parametrize(
    "own", [{}, {"MALLOC_TRIM_THRESHOLD_": "1000000"}], ids=["by default", "settings of one's own"]
)
def test_what_is_freed_is_kept_for_what_comes_next(own):
    environment = {name: value for name, value in os.environ.items() if name not in heap.CHOSEN} | own
    run = subprocess.run([sys.executable, "-c", PROCESS], env=environment, capture_output=True, text=True, check=True)
    found = json.loads(run.stdout)
    assert found["first"] > 10_000
    assert found["again"] > 10_000
    assert found["kept"] == (not own)
    assert (found["later"] < 1000) == (not own)
    assert found["after"] <= found["before"] - (0 if own else 10_000)
