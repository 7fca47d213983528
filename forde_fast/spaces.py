"""What of a member is compared: particles, attached to the graph that pulls a gradient on them back to parameters.

A space is a callable (forward, x, y) -> (outputs, particles): `forward` maps x [B, ...] to the member's outputs
[B, K] with its parameters in the graph; particles [B, D] (in general [G, D]) carry that graph. The trainer then
takes one vector-Jacobian product with the cotangents (1, repulsion gradient) of (loss, particles): exact for any
module, terms across samples by BatchNorm and dropout masks included.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from forde_fast.validation import expect, one_of

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
