"""Compiles the kernels for GPUs that are not here, as the launchers would; prints one JSON line for each.

A process of its own (see test_kernels_aot.py): an interpreter-mode Triton cannot compile. The launchers run on
meta tensors with _launch replaced, so that tiles and specialisations are the shipped ones.
"""

import json
import re
import subprocess
import sys
import tempfile
from multiprocessing import Pool
from pathlib import Path

import torch
import triton
from forde_fast.kernels import at_once, low_rank, repulsion
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
TILE = ("BLOCK_I", "BLOCK_J", "BLOCK", "ROWS", "COLUMNS", "SAMPLES", "LANES", "V")
TYPES = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float64: "*fp64"}
TYPES |= {torch.int32: "*i32"}


def launches(members, others, samples, columns, dtype, with_product, at_once_too=True):
    """Every launch of the operations at this size: [(kernel, arguments, constants)]."""
    recorded = []
    repulsion._launch = lambda kernel, programs, tensors, numbers, constants: recorded.append(
        (kernel, (*tensors, *numbers), constants)
    )
    particles = torch.empty(members, samples, columns, dtype=dtype, device="meta")
    other = None if others is None else torch.empty(others, samples, columns, dtype=dtype, device="meta")
    alone = members == 1 and others is None
    z = None if alone else repulsion.contrasts(particles, other, True, 1e-24)
    product = z if with_product else None
    d, alignment, inverse_norm = repulsion.pair_distances(particles, other, product, True, 1e-24)
    _, c, _, projection = repulsion.median_rule(d, alignment, 2.3)
    repulsion.combine(particles, other, product, inverse_norm, c, projection)
    if with_product:  # the low-rank path: K columns of the product
        low_rank.coordinates(particles, other, z[:, :, :256], True, 1e-24)
        mixed = torch.empty(particles.shape, dtype=z.dtype, device="meta")
        low_rank.project(particles, mixed, other, None, True, 1e-24)
        low_rank.project(particles, mixed, other, c, True, 1e-24)
    acc = repulsion._types(particles)[0]
    if others is None and 2 <= members <= repulsion._most_rows_at_once(acc) and at_once_too:
        half = acc if acc == torch.float64 else torch.float16
        factor = torch.empty(columns, 256, dtype=acc, device="meta")
        matrix = torch.empty(columns, columns, dtype=half, device="meta") if with_product else None
        at_once.at_once(particles, None, matrix, 0.5, True, 1e-24, 2.3)
        at_once.at_once_low_rank(particles, factor, factor.to(half), 0.5, 0.01, 1e-24, 2.3, "tf32")
    return recorded


def source(kernel, arguments, constants):
    """What triton.jit would make of this call: ones become constants, multiples of 16 are known as such."""
    constants = {k: v for k, v in constants.items() if k != "num_warps"}
    signature, attributes = {}, {}
    for index, (name, value) in enumerate(zip(kernel.arg_names, arguments, strict=False)):
        if isinstance(value, torch.Tensor):
            signature[name] = TYPES[value.dtype]
        elif value == 1:
            signature[name], constants[name] = "constexpr", 1
            continue
        else:
            signature[name] = "i32" if value < 2**31 else "i64"
        if isinstance(value, torch.Tensor) or value % 16 == 0:
            attributes[(index,)] = [["tt.divisibility", 16]]
    signature |= dict.fromkeys(constants, "constexpr")
    order = {name: signature[name] for name in kernel.arg_names}
    return ASTSource(kernel, order, {(kernel.arg_names.index(k),): v for k, v in constants.items()}, attributes)


def resources(cubin):
    """Registers and bytes of stack (spills) of the one kernel in a cubin, from the disassembler's table."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([CUOBJDUMP, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    found = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", text))
    return int(found["REG"]), int(found["STACK"]) + int(found["LOCAL"])


def compile_case(job):
    arch, case = job
    repulsion._chip = lambda rows: arch // 10
    rows = []
    for kernel, arguments, constants in launches(*case):
        options = {"num_warps": constants["num_warps"], "enable_fp_fusion": False}
        compiled = triton.compile(source(kernel, arguments, constants), GPUTarget("cuda", arch, 32), options)
        registers, stack = resources(compiled.asm["cubin"])
        rows.append(
            {
                "arch": arch,
                "kernel": kernel.fn.__name__,
                "case": [str(x).removeprefix("torch.") for x in case],
                "tile": [value for name, value in constants.items() if name in TILE],
                "warps": constants["num_warps"],
                "registers": registers,
                "stack": stack,
                "shared": compiled.metadata.shared,
            }
        )
    return rows


if __name__ == "__main__":
    jobs = [(arch, (*case[:4], getattr(torch, case[4]), *case[5:])) for arch, case in json.loads(sys.argv[1])]
    with Pool(2) as pool:
        for rows in pool.imap(compile_case, jobs):
            for row in rows:
                print(json.dumps(row), flush=True)
