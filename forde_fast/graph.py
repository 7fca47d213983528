"""A training step as a CUDA graph: recorded once for each kind of step, then launched as a whole.

A kind of step is computed as usual the first two times that it comes. The first time makes what is made once
(compiled kernels, libraries' handles, a lengthscale's matrices); the second is watched for what waits for the device,
which cannot be recorded. So nothing has to be tried out and undone. The third time it is recorded, which computes
nothing, and launched.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable

import torch
from torch import Tensor

from forde_fast.step import Log
from forde_fast.strategies import Strategy
from forde_fast.validation import reason_of

MOST = 16  # kinds of step that are recorded: shapes of batches may be many


def why_not(device: torch.device, strategy: Strategy, optimizer: object) -> str:
    """Why steps cannot be recorded; empty where they can."""
    if device.type != "cuda":
        return "it needs a CUDA device"
    if optimizer is not None:
        return "a torch optimiser has numbers on the host that change"
    if strategy.members_at_a_time is not None:
        return "members_at_a_time sets the generators back, on the host"
    return ""


class Recorder:
    """Calls `update(x, y, rate, *rest)` -> Log, or launches what was recorded of such a call.

    reason  why nothing is recorded any more; empty as long as all goes well
    """

    def __init__(self, update: Callable[..., Log]):
        self.update, self.reason = update, ""
        self._forget(())

    def _forget(self, constants: tuple) -> None:
        self.constants = constants
        self.came: Counter[tuple] = Counter()
        self.launches: dict[tuple, Callable[[], Log]] = {}
        self.inputs: dict[tuple, tuple[Tensor, Tensor, Tensor]] = {}  # x, y, rate: where the graphs read them
        self.pool = None  # memory that all graphs share: never two of them run at a time

    def __call__(self, x: Tensor, y: Tensor, rate: float, rest: tuple, kind: tuple, constants: tuple) -> Log:
        """One step. `kind` tells apart what `rest` is; what was recorded holds for these very `constants`."""
        if [id(one) for one in constants] != [id(one) for one in self.constants]:
            self._forget(constants)
        shape = x.shape, x.dtype, y.shape, y.dtype
        kind = *kind, *shape
        self.came[kind] += 1
        full = len(self.launches) == MOST and kind not in self.launches
        if self.reason or full or self.came[kind] == 1:
            return self.update(x, y, rate, *rest)
        if self.came[kind] == 2:
            log, self.reason = waits_in(lambda: self.update(x, y, rate, *rest))
            return log
        if shape not in self.inputs:
            on_device = torch.empty((), dtype=torch.float64, device=x.device)
            self.inputs[shape] = torch.empty_like(x), torch.empty_like(y), on_device
        inputs = self.inputs[shape]
        inputs[0].copy_(x.detach())
        inputs[1].copy_(y.detach())
        inputs[2].fill_(rate)
        if kind not in self.launches:
            try:
                self.launches[kind], self.pool = record(lambda: self.update(*inputs, *rest), x.device, self.pool)
            except Exception as error:  # whatever a module does that cannot be recorded; out of memory
                error = error.__context__ or error  # the end of a failed recording has an error of its own
                self._forget(constants)
                self.reason = f"{type(error).__name__}: {reason_of(error)}"
                return self.update(x, y, rate, *rest)
        return Log(*(number.clone() for number in self.launches[kind]()))  # the next launch overwrites them


def record(run: Callable[[], Log], device: torch.device, pool) -> tuple[Callable[[], Log], object]:
    """A call that launches what `run` does on the device and returns the tensors that run returned; the pool."""
    graph, stream = torch.cuda.CUDAGraph(), _stream(device)
    torch.cuda.synchronize(device)
    torch.cuda.empty_cache()  # a graph cannot use what is kept for other steps
    with torch.cuda.stream(stream):
        # "thread_local": a loader's thread may pin memory meanwhile
        graph.capture_begin(pool, capture_error_mode="thread_local")
        try:
            log = run()
        finally:
            graph.capture_end()

    def launch() -> Log:
        graph.replay()
        return log

    return launch, graph.pool()


_streams: dict[torch.device, torch.cuda.Stream] = {}


def _stream(device: torch.device) -> torch.cuda.Stream:
    """The one that is recorded, the same for all graphs: memory is shared within a stream."""
    if device not in _streams:
        _streams[device] = torch.cuda.Stream(device)
    return _streams[device]


def waits_in(run: Callable[[], Log]) -> tuple[Log, str]:
    """What `run` returns, and what in it waited for the device; empty if nothing did."""
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            log = run()
        finally:
            torch.cuda.set_sync_debug_mode(before)
    waits = [w for w in found if "called a synchronizing CUDA operation" in str(w.message)]
    for other in found:
        if other not in waits and "ynchronization debug mode" not in str(other.message):
            warnings.warn_explicit(other.message, other.category, other.filename, other.lineno)
    if not waits:
        return log, ""
    return log, f"a step waits for the device ({waits[0].filename}, line {waits[0].lineno})"
