"""How the M members of an ensemble are computed: one after another, stacked, or on several CUDA streams.

All strategies compute the same numbers up to rounding. What differs is how many members share a graph (one, or
several under torch.vmap over their stacked parameters) and how many members' graphs are alive at a time.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from forde_fast import validation
from forde_fast.ensemble import Ensemble
from forde_fast.members import One, Stacked, autocast
from forde_fast.precision import products_in

KINDS = ("loop", "stacked", "streams")
PRECISIONS = ("full", "tf32", "bf16")
# Parameters of a member up to which all members' graphs may be alive without repulsion, where a larger one's is freed
# before the next: stacked ResNets (from 0.7 million on) were never the faster ones
SMALL = 1 << 19
STREAMS = 4  # so many members at once keep a GPU busy; more only share its caches


@dataclass(frozen=True)
class Strategy:
    """kind               "loop": one member after another; "stacked": all in one graph by torch.vmap, for perceptrons
                       and small networks; "streams": members on several CUDA streams
    members_at_a_time  so many members' graphs are alive while there is repulsion. The others are computed twice:
                       for their particles, and again, with the same dropout masks, when the repulsion is known
                       and pulled back: up to half more time for less memory, the same result. None: all of them
    precision          "full": the parameters' own; "tf32": products of float32 in tf32 on CUDA; "bf16": forward
                       passes under autocast. Losses, particles, the repulsion and the parameters stay as they are
    channels_last      images in that memory layout

    Stacked members draw dropout masks of their own, but from torch's generator in another order than a loop
    does: the two do not share a random stream.
    """

    kind: str = "loop"
    members_at_a_time: int | None = None
    precision: str = "full"
    channels_last: bool = False

    def __post_init__(self):
        validation.one_of(self.kind, "strategy", KINDS)
        validation.one_of(self.precision, "precision", PRECISIONS)
        if self.members_at_a_time is not None:
            validation.whole(self.members_at_a_time, "members_at_a_time")

    def groups(self, members: int) -> list[slice]:
        """Which members share a graph."""
        size = 1
        if self.kind == "stacked":
            size = min(members, self.members_at_a_time or members)
        return [slice(i, min(i + size, members)) for i in range(0, members, size)]


LOOP = Strategy()


def ignored(rows: Tensor) -> None:
    """What is done with a group's rows where nobody waits for them."""


def small(ensemble: Ensemble) -> bool:
    return max(ensemble.sizes) <= SMALL


def alike(ensemble: Ensemble) -> bool:
    """Whether all members are in the same training or evaluation modes, submodule by submodule."""
    first, *others = [[module.training for module in member.modules()] for member in ensemble.members]
    return all(own == first for own in others)


class Graphs:
    """The autograd graphs of all members on one batch, from the parameters [M, P] to losses and particles.

    buffers  one dict per member, updated in place; None: the members' own
    space    of the particles; None: there are none
    apart    x, y of the particles' own forward pass; None: they share the loss's
    """

    def __init__(self, ensemble: Ensemble, parameters: Tensor, buffers: tuple[dict[str, Tensor], ...] | None,
                 x: Tensor, y: Tensor, loss: Callable, strategy: Strategy, space: Callable | None = None,
                 apart: tuple[Tensor, Tensor] | None = None):  # fmt: skip
        self.ensemble, self.parameters, self.buffers, self.strategy = ensemble, parameters, buffers, strategy
        self.x, self.y, self.loss, self.space = self._laid_out(x), y, loss, space
        self.apart = apart and (self._laid_out(apart[0]), apart[1])
        stacks = strategy.kind == "stacked" and alike(ensemble)  # modes may change between steps
        self.groups = (strategy if stacks else LOOP).groups(len(ensemble))
        self.streams = _Streams(x.device if strategy.kind == "streams" and x.is_cuda else None)
        self.losses = parameters.new_empty(len(ensemble))
        self.together = small(ensemble) and strategy.members_at_a_time is None and not self.streams.pool
        self.alive: dict[int, _Graph] = {}
        self.before: dict[int, tuple] = {}  # buffers and generators, of the groups that are computed twice

    def _laid_out(self, x: Tensor) -> Tensor:
        if self.strategy.channels_last and x.ndim == 4:
            return x.contiguous(memory_format=torch.channels_last)
        # canonical strides: with others along its one channel a grey image passes for channels_last, on which
        return x.reshape(-1).view(x.shape)  # oneDNN's backward (torch 2.13) writes beyond its memory

    def plain(self, done: Callable[[Tensor], None] = ignored) -> tuple[Tensor, Tensor]:
        """Without particles: the losses' gradients [M, P] and the losses [M]; one graph is alive at a time, or all of
        small members, whose backward passes then share a call.

        done  called with the rows of each group as soon as they are there
        """
        g, graphs = torch.empty_like(self.parameters), []
        with self._running() as on_its_stream:
            for number, group in enumerate(self.groups):
                with on_its_stream(number):
                    graphs.append(_Graph(self, group, self._buffers(group)))
                    if self.together and number < len(self.groups) - 1:
                        continue
                    for graph, gradients in zip(graphs, _pull_back(graphs), strict=True):
                        self.losses[graph.group] = graph.losses.detach()
                        _write(g[graph.group], gradients)
                        done(g[graph.group])
                    graphs.clear()
        return g, self.losses

    def forward(self, done: Callable[[Tensor], None] = ignored) -> tuple[Tensor, Tensor]:
        """Losses [M] and particles [M, G, D], without graph. `done` is called with those of each group in turn."""
        kept, limit = len(self.groups), self.strategy.members_at_a_time
        if limit is not None:
            kept = max(1, limit // (self.groups[0].stop - self.groups[0].start))
        particles = []
        with self._running() as on_its_stream:
            for number, group in enumerate(self.groups):
                with on_its_stream(number):
                    buffers, last = self._buffers(group), number >= len(self.groups) - kept
                    if not last:
                        self.before[number] = self._copies(group), random_state(self.x.device)
                    graph = _Graph(self, group, buffers)
                    self.losses[group] = graph.losses.detach()
                    own = self.streams.shared(graph.particles.detach())
                    particles.append(own.reshape(-1, *own.shape[-2:]))
                    done(particles[-1])
                    if last:
                        self.alive[number] = graph
                    del graph
        return self.losses, torch.cat(particles)

    def pull_back(self, cotangents: Callable[[slice], Tensor], measure: bool = False,
                  done: Callable[[Tensor], None] = ignored) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        """The gradient [M, P] of the losses and, with the particles' cotangents, of what these stand for.

        Frees the graphs, the last group's first. If `measure`, the losses' gradient alone too, before the group's
        cotangents [n, G, D] are asked for; `done` is called with each of a group's gradients.
        """
        g = plain = None  # until the first graph has freed what it held: all are alive now
        after = random_state(self.x.device) if self.before else None
        with self._running() as on_its_stream:
            for number in reversed(range(len(self.groups))):  # those that are alive come first
                group = self.groups[number]
                with on_its_stream(number):
                    graph = self.alive.pop(number) if number in self.alive else self._again(number)
                    if measure:
                        plain = self.streams.new_like(self.parameters) if plain is None else plain
                        _write(plain[group], graph.pull_back(keep=True))
                        done(plain[group])
                    gradients = graph.pull_back(cotangents(group))
                    g = self.streams.new_like(self.parameters) if g is None else g
                    _write(g[group], gradients)
                    done(g[group])
                    del graph, gradients
        if after is not None:
            set_random_state(after, self.x.device)
        return g, plain

    def _again(self, number: int) -> _Graph:
        """The group's graph as it was; the buffers that it writes are copies that nobody reads."""
        buffers, random = self.before.pop(number)
        set_random_state(random, self.x.device)
        return _Graph(self, self.groups[number], buffers)

    def _buffers(self, group: slice) -> list[dict[str, Tensor]] | None:
        return None if self.buffers is None else list(self.buffers[group])

    def _copies(self, group: slice) -> list[dict[str, Tensor]]:
        buffers = self._buffers(group) or [dict(member.named_buffers()) for member in self.ensemble.members[group]]
        return [{name: b.clone() for name, b in own.items()} for own in buffers]

    @contextlib.contextmanager
    def _running(self) -> Iterator[Callable]:
        rounds = self.strategy.precision == "tf32" and torch.cuda.is_available()
        with products_in("tf32", convolutions=True) if rounds else contextlib.nullcontext(), self.streams:
            yield self.streams.of


class _Graph:
    """Of one group of n members: losses [] or [n], particles [G, D] or [n, G, D], and the leaves they hang on."""

    def __init__(self, whole: Graphs, group: slice, buffers: list[dict[str, Tensor]] | None):
        modules, x, y = list(whole.ensemble.members[group]), whole.x, whole.y
        self.group = group
        self.size = whole.ensemble.sizes[group.start]  # of a row's entries; there are more where another is larger
        own = buffers is None and whole.parameters is whole.ensemble.flat  # one needs no tensors put in place
        rows = None if own and len(modules) == 1 else whole.parameters[group, : self.size].detach()
        if len(modules) > 1:
            members = Stacked(modules, rows, buffers)
            loss, space = (
                torch.vmap(whole.loss, (0, None)),
                whole.space and functools.partial(whole.space.stacked, members=len(modules)),
            )
        else:
            members = One(modules[0], whole.ensemble.leaves[group.start], None if own else rows[0], buffers)
            loss, space = whole.loss, whole.space
        self.leaves, self.particles = members.leaves, None
        forward = autocast(members, whole.strategy.precision)
        if space is not None and whole.apart is None:
            outputs, self.particles = space(forward, x, y)
        else:
            outputs = forward(x)
            if space is not None:
                with members.buffers_kept():
                    _, self.particles = space(forward, *whole.apart)
        self.losses = loss(outputs, y)
        single = isinstance(self.losses, Tensor) and self.losses.ndim == (len(modules) > 1)
        if not single:
            got = list(self.losses.shape) if isinstance(self.losses, Tensor) else type(self.losses).__name__
            validation.refuse("loss", "a callable (outputs, y) -> a tensor [], the batch's", got, TypeError)
        members.finish()

    def pull_back(self, cotangents: Tensor | None = None, keep: bool = False) -> tuple[Tensor, ...]:
        """The leaves' gradients."""
        outputs, weights = [self.losses], [torch.ones_like(self.losses)]
        if cotangents is not None:
            outputs.append(self.particles)
            weights.append(cotangents.view_as(self.particles))
        return torch.autograd.grad(outputs, self.leaves, weights, retain_graph=keep, materialize_grads=True)


def _pull_back(graphs: list[_Graph]) -> list[tuple[Tensor, ...]]:
    """Their leaves' gradients of the losses, in one call of autograd, of which a small network feels each."""
    leaves = [leaf for graph in graphs for leaf in graph.leaves]
    losses = [graph.losses for graph in graphs]
    gradients = iter(torch.autograd.grad(losses, leaves, [*map(torch.ones_like, losses)], materialize_grads=True))
    return [tuple(itertools.islice(gradients, len(graph.leaves))) for graph in graphs]


def _write(out: Tensor, gradients: tuple[Tensor, ...]) -> None:
    """Gradients [...] or [n, ...] one behind the other into out [n, P], zeros behind the last."""
    size = sum(one.numel() for one in gradients) // len(out)
    if size < out.shape[1]:
        out[:, size:].zero_()
    if not out.is_cuda:
        torch.cat([one.reshape(len(out), -1) for one in gradients], 1, out=out[:, :size])
        return
    to = out[:, :size].split([one.numel() // len(out) for one in gradients], 1)  # cat: a fifth of the bandwidth
    pairs = [(view.view(one.shape), one) for view, one in zip(to, gradients, strict=True)]
    alike = [pair for pair in pairs if pair[1].is_contiguous()]
    if alike:
        torch._foreach_copy_([view for view, _ in alike], [one for _, one in alike])
    for view, one in pairs:  # other layouts would keep foreach from one launch for all
        if not one.is_contiguous():
            view.copy_(one)


class _Streams:
    """As a context: the streams begin after the present one's work, and the present one goes on after theirs."""

    def __init__(self, device: torch.device | None):
        self.pool = [] if device is None else _pool(device)

    def __enter__(self) -> None:
        self.outside = torch.cuda.current_stream(self.pool[0].device) if self.pool else None
        for stream in self.pool:
            stream.wait_stream(self.outside)

    def __exit__(self, *error) -> None:
        for stream in self.pool:
            self.outside.wait_stream(stream)

    def of(self, number: int):
        """The context in which group `number` is computed."""
        return torch.cuda.stream(self.pool[number % STREAMS]) if self.pool else contextlib.nullcontext()

    def new_like(self, tensor: Tensor) -> Tensor:
        """Memory into which all of the streams may write: of the one outside, for whose work they have waited. What
        one of them had before may still be at work in that stream alone."""
        with torch.cuda.stream(self.outside) if self.pool else contextlib.nullcontext():
            return torch.empty_like(tensor)

    def shared(self, tensor: Tensor) -> Tensor:
        """Of one of the streams, and read by the one outside: its memory is not to be used again before."""
        if self.pool:
            tensor.record_stream(self.outside)
        return tensor


@functools.cache
def _pool(device: torch.device) -> list:
    return [torch.cuda.Stream(device) for _ in range(STREAMS)]


def random_state(device: torch.device) -> list[Tensor]:
    """Of torch's generators on the CPU and on `device`."""
    return [torch.get_rng_state(), *([torch.cuda.get_rng_state(device)] if device.type == "cuda" else [])]


def set_random_state(random: list[Tensor], device: torch.device) -> None:
    torch.set_rng_state(random[0].cpu())
    if len(random) > 1 and device.type == "cuda":
        torch.cuda.set_rng_state(random[1].cpu(), device)
