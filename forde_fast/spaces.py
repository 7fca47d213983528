"""What of a member is compared: particles, attached to the graph that pulls a gradient on them back to parameters.

A space is a callable (forward, x, y) -> (outputs, values): `forward` maps x [B, ...] to the member's outputs
[B, K] with its parameters in the graph; the values, particles [B, D] (in general [G, D]), carry that graph. The
trainer then takes one vector-Jacobian product with the cotangents (1, repulsion gradient) of (loss, values): exact
for any module, terms across samples by BatchNorm and dropout masks included.

`forward` has its trainable parameters as `forward.parameters()`, and `forward(x, input_of=layer)` gives the outputs
and what the submodule of that name received. A space may have more than its call:

    stacked(forward, x, y, members)   the same of n members at once, values [n, G, D], for strategy="stacked"
    together(values, total)           of all members' values [M, G, D] -> the particles, differentiable with torch;
                                      `total` adds up sums over columns, where values have a part of them
    known(values)                     of all members' values, what a method's prior is a function of
    check(ensemble)                   raises ValueError for one that it cannot be used with
    split                             how values of a part of the batch relate to the whole one's: "samples" (the
                                      default) are groups, "columns" are columns, "nothing": they are the same
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from forde_fast.eigen import directions
from forde_fast.validation import expect, one_of, whole

SCORES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "logit": lambda outputs, y: outputs.gather(1, y[:, None])[:, 0],
    "log_probability": lambda outputs, y: outputs.log_softmax(1).gather(1, y[:, None])[:, 0],
}


@dataclass(frozen=True)
class InputGradients:
    """J[b] = d score_b / d x_b, flattened: FoRDE's space (Trinh et al., ICLR 2024, section 3).

    score  "logit": the true class's raw logit (the published code); "log_probability": its log-softmax (the
           paper's section 3.2); or any callable(outputs, y) -> [B]: regression, soft labels, several labels
    """

    score: str | Callable[[Tensor, Tensor], Tensor] = "logit"

    def __post_init__(self):
        if not callable(self.score):
            one_of(self.score, "score", SCORES)

    def __call__(self, forward: Callable[[Tensor], Tensor], x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """x [B, ...] floating, y [B] -> outputs, J [B, D] with D the number of values of one x."""
        x = x.detach().requires_grad_()
        with sdpa_kernel(SDPBackend.MATH):  # fused attention has no second derivative
            outputs = forward(x)
        return outputs, _gradients(self._scores(outputs, y), x).flatten(1)

    def stacked(self, forward: Callable, x: Tensor, y: Tensor, members: int) -> tuple[Tensor, Tensor]:
        """The same of n members at once: `forward` maps an x for each [n, B, ...] to [n, B, K]; J [n, B, D]."""
        x = x.expand(members, *x.shape).detach().requires_grad_()
        with sdpa_kernel(SDPBackend.MATH):
            outputs = forward(x, each=True)
        return outputs, _gradients(torch.vmap(self._scores, (0, None))(outputs, y), x).flatten(2)

    def _scores(self, outputs: Tensor, y: Tensor) -> Tensor:
        scores = (self.score if callable(self.score) else SCORES[self.score])(outputs, y)
        expect(scores.shape == y.shape[:1], "score", f"one number per sample, [{len(y)}]", list(scores.shape))
        return scores


def _gradients(scores: Tensor, x: Tensor) -> Tensor:
    """Of the sum of the scores with respect to x, themselves differentiable."""
    (gradients,) = torch.autograd.grad(scores.sum(), x, create_graph=True)
    return gradients


@dataclass(frozen=True)
class Weights:
    """A member's trainable parameters, one particle [1, P]: weight-RDE's space (D'Angelo & Fortuin, NeurIPS 2021)."""

    split = "nothing"

    def __call__(self, forward: Callable, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        own = [p for p in forward.parameters() if p.requires_grad]
        return forward(x), torch.cat([p.flatten() for p in own])[None]

    def stacked(self, forward: Callable, x: Tensor, y: Tensor, members: int) -> tuple[Tensor, Tensor]:
        return forward(x), torch.cat([p.flatten(1) for p in forward.parameters()], 1)[:, None]

    def check(self, ensemble) -> None:
        expect(ensemble.uniform, "ensemble", "members of the same parameters, which are compared", "others")


@dataclass(frozen=True)
class Outputs:
    """A member's outputs on the batch, one particle [1, B K]: function-RDE's space (D'Angelo & Fortuin).

    of  "logits": as they are; "probabilities": their softmax
    """

    of: str = "logits"
    split = "columns"

    def __post_init__(self):
        one_of(self.of, "of", ("logits", "probabilities"))

    def __call__(self, forward: Callable, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        outputs = forward(x)
        return outputs, self._values(outputs).flatten()[None]

    def stacked(self, forward: Callable, x: Tensor, y: Tensor, members: int) -> tuple[Tensor, Tensor]:
        outputs = forward(x)
        return outputs, self._values(outputs).flatten(1)[:, None]

    def _values(self, outputs: Tensor) -> Tensor:
        return outputs.softmax(-1) if self.of == "probabilities" else outputs


@dataclass(frozen=True)
class Features:
    """What the last layer receives, f_p [B, F], along a few directions: feature-RDE's space (Yashima et al. 2022).

    With G_p = d(sum_b CE)/df_p, flattened, and (w, V) the eigenvalues and eigenvectors of their Gram matrix [M, M],
    the directions are e_q = w_q^-1/2 sum_p V_pq G_p and the particle [1, directions] of member p is (f_p . e_q)_q.

    directions  how many, at most M
    keep        those of the "smallest" (the published code) or "largest" eigenvalues
    layer       the name of the last layer, which all members are meant to share: Ensemble(..., shared="head")
    """

    directions: int = 5
    keep: str = "smallest"
    layer: str = "head"
    split = "columns"

    def __post_init__(self):
        whole(self.directions, "directions")
        one_of(self.keep, "keep", ("smallest", "largest"))

    def __call__(self, forward: Callable, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Values [2, B F]: f and, as a constant, G."""
        outputs, features = forward(x, input_of=self.layer)
        return outputs, torch.stack([features.flatten(), self._slopes(outputs, y, features).flatten()])

    def stacked(self, forward: Callable, x: Tensor, y: Tensor, members: int) -> tuple[Tensor, Tensor]:
        outputs, features = forward(x, input_of=self.layer)
        slopes = self._slopes(outputs.flatten(0, 1), y.repeat(members, *[1] * (y.ndim - 1)), features)
        return outputs, torch.stack([features.flatten(1), slopes.flatten(1)], 1)

    def _slopes(self, outputs: Tensor, y: Tensor, features: Tensor) -> Tensor:
        loss = F.cross_entropy(outputs, y, reduction="sum")
        return torch.autograd.grad(loss, features, retain_graph=True)[0]

    def together(self, values: Tensor, total: Callable[[Tensor], Tensor] = lambda sum: sum) -> Tensor:
        features, slopes = values.unbind(1)
        kept = directions(slopes.detach(), self.directions, self.keep == "largest", total)
        return total(features.double() @ kept.T).to(values.dtype)[:, None]

    def known(self, values: Tensor) -> Tensor:
        return values[:, 0]

    def check(self, ensemble) -> None:
        for number, member in enumerate(ensemble.members):
            names = [name for name, _ in member.named_modules()]
            got = f"{self.layer} (spaces.Features(layer=...) takes another)"
            expect(self.layer in names, "layer", f"a layer of modules[{number}], with the last one", got)


def input_of(module: torch.nn.Module, layer: str, call: Callable[[], Tensor]) -> tuple[Tensor, Tensor]:
    """What `call`, which runs the module, returns, and what the module's `layer` received in it."""
    received = []
    hook = module.get_submodule(layer).register_forward_pre_hook(lambda _, given: received.append(given[0]))
    try:
        outputs = call()
    finally:
        hook.remove()
    return outputs, received[-1]
