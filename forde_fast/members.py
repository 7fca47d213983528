"""Members as functions of a batch, from their parameters as the leaves of a graph: one, or several by torch.vmap."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.func import functional_call

from forde_fast.ensemble import AS_BUILT, FROZEN, trainable
from forde_fast.spaces import input_of as with_input_of
from forde_fast.validation import expect


class One:
    """One member as a function of x [B, ...]: itself, or with other parameters [P] and buffers in it."""

    def __init__(self, module: nn.Module, leaves: list[Tensor], row: Tensor | None,
                 buffers: list[dict[str, Tensor]] | None):  # fmt: skip
        self.module, self.leaves, self.tensors = module, leaves, dict(buffers[0]) if buffers else {}
        if row is None:
            expect(all(p.requires_grad for p in leaves), *AS_BUILT, FROZEN)
        else:
            named = trainable(module)
            self.leaves = _leaves(named, row)
            self.tensors |= {name: leaf for (name, _), leaf in zip(named, self.leaves, strict=True)}

    def __call__(self, x: Tensor, input_of: str | None = None) -> Tensor | tuple[Tensor, Tensor]:
        def call() -> Tensor:
            return functional_call(self.module, self.tensors, (x,)) if self.tensors else self.module(x)

        return call() if input_of is None else with_input_of(self.module, input_of, call)

    def parameters(self) -> list[Tensor]:
        return self.leaves

    @contextlib.contextmanager
    def buffers_kept(self) -> Iterator[None]:
        """What is written into buffers in here is lost."""
        before, own = self.tensors, dict(self.module.named_buffers())
        self.tensors = before | {name: before.get(name, b).clone() for name, b in own.items()}
        yield
        self.tensors = before

    def finish(self) -> None:
        """The buffers were written in place."""


class Stacked:
    """n members as one function, by torch.vmap: of x [B, ...] or, with `each`, of an x for each [n, B, ...]."""

    def __init__(self, modules: list[nn.Module], rows: Tensor, buffers: list[dict[str, Tensor]] | None):
        named = trainable(modules[0])
        self.module, self.leaves = modules[0], _leaves(named, rows)
        frozen = [{name: p for name, p in module.named_parameters() if not p.requires_grad} for module in modules]
        self.named = dict(zip((name for name, _ in named), self.leaves, strict=True)) | _stack(frozen)
        self.written = [dict(module.named_buffers()) for module in modules] if buffers is None else buffers
        self.buffers = _stack(self.written)  # batched: vmap refuses to write into unbatched ones

    def __call__(self, x: Tensor, each: bool = False, input_of: str | None = None):
        def member(parameters, buffers, x):
            def call() -> Tensor:
                return functional_call(self.module, {**parameters, **buffers}, (x,))

            return call() if input_of is None else with_input_of(self.module, input_of, call)

        over = torch.vmap(member, (0, 0, 0 if each else None), randomness="different")
        return over(self.named, self.buffers, x)

    def parameters(self) -> list[Tensor]:
        return self.leaves

    @contextlib.contextmanager
    def buffers_kept(self) -> Iterator[None]:
        """What is written into buffers in here is lost."""
        before = self.buffers
        self.buffers = {name: b.clone() for name, b in before.items()}
        yield
        self.buffers = before

    def finish(self) -> None:
        """Write the stacked buffers back into the members'."""
        for name, stacked in self.buffers.items():
            torch._foreach_copy_([own[name] for own in self.written], list(stacked.unbind()))


def _leaves(named: list[tuple[str, nn.Parameter]], rows: Tensor) -> list[Tensor]:
    """Parameters [P] or [n, P] as leaves of a graph, each [...] or [n, ...]."""
    size = sum(p.numel() for _, p in named)
    expect(size == rows.shape[-1], *AS_BUILT, f"{size} numbers, not {rows.shape[-1]}")
    views = rows.split([p.numel() for _, p in named], -1)
    return [
        v.view(rows.shape[:-1] + p.shape).detach().requires_grad_() for v, (_, p) in zip(views, named, strict=True)
    ]


def _stack(dicts: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.stack([one[name].detach() for one in dicts]) for name in dicts[0]}


def autocast(forward: Callable, precision: str) -> Callable:
    if precision != "bf16":
        return forward

    def run(x: Tensor, **options) -> Tensor | tuple[Tensor, ...]:
        with torch.autocast(x.device.type, torch.bfloat16):
            out = forward(x, **options)
        return out.to(x.dtype) if isinstance(out, Tensor) else tuple(one.to(x.dtype) for one in out)

    run.parameters = forward.parameters
    return run
