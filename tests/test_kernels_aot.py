"""What the compiler makes of the Triton kernels for GPUs that are not here: no spills, few registers."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

PUBLISHED = (10, None, 128, 3072, "float32", True)
CASES = [  # members, others, samples, columns, type, product: between them every kernel
    (*PUBLISHED, False),  # without the forms that kernels have for a few members at once
    (2, None, 1, 20_000, "float32", False),  # columns split over programs
    (10, None, 1, 11_173_962, "float32", False, False),  # so many columns that norms are guessed
    (64, None, 128, 3072, "float32", True),  # full blocks of pairs
    (16, 9, 128, 3071, "bfloat16", False),  # others; rows that start unaligned
]
FULLEST = [  # the most sums that a thread has: for one chip, as they take longest to compile
    PUBLISHED,
    (16, None, 1, 2_000_000, "bfloat16", True),
    (10, None, 128, 240, "float64", False),
    (16, None, 1, 20_000_000, "float32", False, False),
    (10, None, 1, 20_000_001, "float64", False, False),
]
ONES = [  # numbers of 1 become constants, which have no methods
    (1, None, 1, 1, "float32", False),
    (2, None, 1, 1, "float32", True),
    (1, 1, 1, 1, "float32", True),
    (17, None, 1, 1, "float32", True),
]
SHARED_MEMORY = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
REGISTERS = {
    "_contrasts_kernel": 128,  # eight warps, two programs
    "_contrasts_blocks_kernel": 128,
    "_norms_kernel": 64,
    "_sampled_norms_kernel": 128,  # sixteen warps, a program for each row
    "_settle_kernel": 128,
    "_add_splits_kernel": 168,  # few programs
    "_pair_distances_kernel": 255,  # eight warps, one program on a multiprocessor
    "_pair_blocks_kernel": 255,  # two warps, four programs
    "_bandwidth_kernel": 128,
    "_coefficients_kernel": 128,
    "_coordinates_kernel": 128,
    "_project_kernel": 64,
    "_combine_kernel": 168,  # four warps, three programs; six at the published size
    "_combine_blocks_kernel": 128,
}


@pytest.fixture(scope="module")
def table():
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, Path(__file__).with_name("aot_compile.py")]
    jobs = [(arch, case) for case in CASES for arch in SHARED_MEMORY] + [(90, case) for case in FULLEST + ONES]
    command += [json.dumps(jobs)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    print(f"\n{'sm':>4} {'kernel':24} {'case':42} {'tile':18} warps registers stack shared")
    for row in rows:
        print(
            f"{row['arch']:>4} {row['kernel']:24} {' '.join(row['case']):42} {row['tile']!s:18}"
            f"{row['warps']:6} {row['registers']:9} {row['stack']:5} {row['shared']:6}"
        )
    return rows


def test_every_kernel_compiles_for_every_chip(table):
    found = {(row["arch"], row["kernel"]) for row in table}
    assert found == {(arch, kernel) for arch in SHARED_MEMORY for kernel in REGISTERS}


def test_nothing_spills(table):
    assert not [row for row in table if row["stack"]]


def test_registers_and_shared_memory(table):
    assert not [row for row in table if row["registers"] > REGISTERS[row["kernel"]]]
    assert not [row for row in table if row["shared"] > SHARED_MEMORY[row["arch"]]]
