"""Other rules than the kernel density estimate, for the methods that FoRDE is compared with."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from forde_fast.rule import Median, Rule, bandwidth_of, check_bandwidth
from forde_fast.validation import positive


@dataclass(frozen=True)
class SGE(Rule):
    """(K + ridge I)^-1 sum_j grad k_ij: the Stein gradient estimator in the place of the kernel density estimate's
    sum_j grad k_ij / sum_j k_ij, with K one kernel matrix [M, M] per group (D'Angelo & Fortuin, NeurIPS 2021).

    It is no gradient of a value; the value reported is the kernel density estimate's.
    """

    bandwidth: str | float | Median = field(default_factory=lambda: Median(over="batch", add_one=True))
    ridge: float = 0.01

    def __post_init__(self):
        check_bandwidth(self.bandwidth)
        positive(self.ridge, "ridge")

    def apply(self, d: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        h = bandwidth_of(d, self.bandwidth).expand_as(d)
        kernel = torch.exp(-d / h).movedim(2, 0)  # [G, M, M]
        slopes = kernel * (-2 / len(kernel)) / h.movedim(2, 0)
        ridge = torch.diag_embed(torch.full_like(kernel[..., 0], self.ridge))
        # sum_l A_il sum_j slope_lj (s_l - s_j), A the inverse, as sum_j c_ij (s_i - s_j): the coefficients of s_j in
        # it, whose sum over j is 0, with their sign turned. `_ex` does not wait for the device
        both = torch.cat([slopes, torch.diag_embed(slopes.sum(2))], 2)
        solved, off = torch.linalg.solve_ex(kernel + ridge, both)[0].chunk(2, 2)
        value = (kernel.sum(2).log()).sum() / len(kernel)
        return value, (solved - off).movedim(0, 2), h[0]


@dataclass(frozen=True)
class LIT(Rule):
    """sum_{i<j} mean_b cos(s_ib, s_jb)^2, for normalised particles (Ross, Pan & Doshi-Velez, "Learning qualitatively
    diverse and interpretable rules for classification", 2018; there summed over the samples, as its loss is).

    The cosine is 1 - d / 2 under the identity, where no particle is dead.
    """

    def apply(self, d: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        cosine = 1 - d / 2
        pairs = torch.triu(cosine.movedim(2, 0), 1)
        return pairs.square().sum() / d.shape[2], cosine * (-2 / d.shape[2]), torch.ones_like(d[0])


@dataclass(frozen=True)
class GAL(Rule):
    """mean_b log sum_{i<j} exp cos(s_ib, s_jb), for normalised particles (Kariyappa & Qureshi, "Improving adversarial
    robustness of ensembles with diversity training", 2019). The cosine as in `LIT`."""

    def apply(self, d: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        kernel = torch.exp(1 - d / 2)  # at most e
        if len(d) == 1:  # no pair
            return torch.zeros_like(d[0, 0, 0]), torch.zeros_like(d), torch.ones_like(d[0])
        sums = torch.triu(kernel.movedim(2, 0), 1).sum((1, 2))
        return sums.log().mean(), -kernel / sums / d.shape[2], torch.ones_like(d[0])
