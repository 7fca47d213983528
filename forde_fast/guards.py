"""What stops a training that cannot go on, and says where: numbers that are not finite, too little memory."""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from forde_fast import heap
from forde_fast.ensemble import Ensemble, trainable
from forde_fast.validation import NotFinite, reason_of

MARGIN = 1.3  # of what graphs hold, for what passes need besides


class OutOfMemory(MemoryError):
    """What does not fit, and what would."""


def check_step(ensemble: Ensemble, g: Tensor, log, step: int, first: int = 0) -> None:
    """NotFinite, with step, member and layer, for a gradient [M, P] that is not finite, or a number of the log.

    first  the number of the ensemble's first member among all
    """
    if not math.isfinite(g.sum()):  # one pass; a sum may overflow where no number is infinite
        for number, (row, member) in enumerate(zip(g, ensemble.members, strict=True)):
            named = [(name, p.numel()) for name, p in trainable(member)]
            parts = row[: sum(size for _, size in named)].split([size for _, size in named])
            bad = [name for (name, _), part in zip(named, parts, strict=True) if not torch.isfinite(part).all()]
            if bad:  # the last one is where a backward pass meets it first
                where = f"step {step}, member {first + number}, layer {bad[-1]}"
                raise NotFinite(f"{where}: expected a finite gradient, got nan or infinity; try a smaller lr")
    for name, number in log._asdict().items():
        if not math.isfinite(number):
            raise NotFinite(f"step {step}: expected a finite {name}, got {float(number)}; try a smaller lr")


def located(
    ensemble: Ensemble, x: Tensor, y: Tensor, loss, error: Exception, step: int, first: int = 0
) -> ValueError:
    """The error of a step on x, y: with the member and the layer where numbers stop being finite, if one is found,
    and then NotFinite."""
    for number, member in enumerate(ensemble.members):
        try:
            with _buffers_kept(member):
                layer, what = fault(member, x, y, loss)
        except ValueError:  # the same again, as of a batch that a layer does not take
            break
        if layer is not None:
            where = f"step {step}, member {first + number}, layer {layer or type(member).__name__}"
            return NotFinite(f"{where}: expected {what}, got nan or infinity; try a smaller lr")
    return (NotFinite if isinstance(error, NotFinite) else ValueError)(f"step {step}: {reason_of(error)}")


def fault(module: nn.Module, x: Tensor, y: Tensor, loss) -> tuple[str | None, str]:
    """The first submodule whose output is not finite, else the first one, from the end, into which a gradient comes
    that is not; and which of the two."""
    found: list[tuple[str, str]] = []

    def note(name: str, what: str, tensor) -> None:
        if isinstance(tensor, Tensor) and tensor.is_floating_point() and not torch.isfinite(tensor).all():
            found.append((name, what))

    def after(name: str):
        def hook(_, inputs, output) -> None:
            note(name, "a finite output", output)
            if isinstance(output, Tensor) and output.requires_grad:
                output.register_hook(lambda gradient: note(name, "a finite gradient of its output", gradient))

        return hook

    hooks = [
        part.register_forward_hook(after(name)) for name, part in module.named_modules() if not list(part.children())
    ]
    try:
        with torch.enable_grad():
            outputs = module(x.detach())
            if not found:
                note("", "a finite loss", value := loss(outputs, y))
                torch.autograd.grad(value, [p for _, p in trainable(module)], allow_unused=True)
    finally:
        for hook in hooks:
            hook.remove()
    return found[0] if found else (None, "")


def check_state(ensemble: Ensemble, step: int, first: int = 0) -> None:
    """NotFinite for parameters that are not: such a state is not to be kept."""
    flat = ensemble.flat.detach()
    if math.isfinite(flat.sum()) or torch.isfinite(flat).all():
        return
    for number, member in enumerate(ensemble.members):
        for name, p in trainable(member):
            if not torch.isfinite(p).all():
                where = f"step {step}, member {first + number}, layer {name}"
                raise NotFinite(f"{where}: expected finite parameters, got nan or infinity; try a smaller lr")


@contextlib.contextmanager
def _buffers_kept(module: nn.Module) -> Iterator[None]:
    before = [(b, b.clone()) for b in module.buffers()]
    try:
        yield
    finally:
        with torch.no_grad():
            for b, own in before:
                b.copy_(own)


# ---------------------------------------------------------------- memory


def is_memory(error: BaseException) -> bool:
    """Whether an error says that memory was not there."""
    full = isinstance(error, (torch.OutOfMemoryError, MemoryError))
    return full or (isinstance(error, RuntimeError) and "allocate memory" in str(error))


def what_fits(graph, tried: int, batch: int, device: torch.device, free: int | None = None) -> str:
    """A line on how many members at a time, or what batch, would fit.

    graph         (samples) -> computes one member's graph on so many, which is then let go
    tried, batch  members at a time and samples that did not fit
    free          bytes; None: what the device has
    """
    free = available(device) if free is None else free
    few = max(2, min(8, batch // 4))
    one, two = (held(graph, samples) for samples in (few, 2 * few))
    each = max((two - one) / few, 1.0)  # bytes of a sample
    fixed = max(one - each * few, 0.0)
    need = MARGIN * (fixed + each * batch)
    said = f"a member's graph takes {need / 2**20:,.0f} MiB at batch size {batch}, {free / 2**20:,.0f} MiB are free"
    at_a_time = min(int(free // need), tried - 1)
    if at_a_time >= 1:
        return f"{said}: members_at_a_time = {at_a_time} fits"
    samples = min(int((free / MARGIN - fixed) // each), batch // 2)
    return f"{said}: " + (
        f"batch_size = {samples} with members_at_a_time = 1 fits" if samples >= 2 else "nothing fits"
    )


def held(graph, samples: int) -> int:
    """Bytes that autograd keeps for the backward passes of what `graph(samples)` computes."""
    sizes: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        alive = graph(samples)
    del alive
    return sum(sizes.values())


def available(device: torch.device) -> int:
    """Bytes that are free, and that this process may take."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info(device)[0]
    heap.trim()
    if not Path("/proc/meminfo").exists():  # all that the machine has; os of Windows cannot tell
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else 0
    import resource  # which Windows does not have

    lines = Path("/proc/meminfo").read_text().splitlines()
    free = next((1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable")), 0)
    most, _ = resource.getrlimit(resource.RLIMIT_AS)  # ulimit -v
    if most == resource.RLIM_INFINITY:
        return free
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    return max(0, min(free, most - pages * resource.getpagesize()))
