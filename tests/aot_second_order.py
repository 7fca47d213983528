"""Compiles kernels/second_order.py and layouts.py for GPUs that are not here; a line of JSON for each kernel."""

import json

import torch
import triton
from aot_compile import resources, source
from forde_fast.kernels import layouts, second_order
from triton.backends.compiler import GPUTarget


def launches(dtype, layout):
    recorded = []
    second_order._launch = layouts._launch = lambda kernel, grid, *rest: recorded.append((kernel, *rest))
    x = torch.empty(128, 64, 32, 32, dtype=dtype, device="meta").contiguous(memory_format=layout)
    weight = torch.empty(64, device="meta")
    statistics = second_order.norm_statistics(x, 1e-5)
    layer = (statistics, weight, weight, True)
    second_order.norm_forward(x, x, *layer)
    sums = second_order.norm_backward_sums(x, x, x, *layer)
    second_order.norm_backward(x, x, x, *layer, sums, True)
    double_sums = second_order.norm_double_sums(x, x, x, x, *layer)
    second_order.norm_double_backward(x, x, None, x, x, x, *layer, sums, double_sums)
    filters = torch.empty(64, 512, 3, 3, device="meta")
    layouts.relayout(layouts.relayout(filters, dtype, True), torch.float32, False)
    return recorded


if __name__ == "__main__":
    half, single = (torch.bfloat16, torch.channels_last), (torch.float32, torch.contiguous_format)
    for arch, case in ((80, half), (90, half), (90, single), (100, half)):
        for kernel, tensors, numbers, constants in launches(*case):
            options = {"num_warps": constants["num_warps"]}
            compiled = triton.compile(
                source(kernel, (*tensors, *numbers), constants), GPUTarget("cuda", arch, 32), options
            )
            registers, stack = resources(compiled.asm["cubin"])
            row = {"arch": arch, "pass": constants.get("PASS", "layout"), "registers": registers, "stack": stack}
            print(json.dumps(row), flush=True)
