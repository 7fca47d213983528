"""The methods: each is a space, a way to weigh differences in it, and a rule from distances to the repulsion."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from torch import Tensor

from forde_fast import validation
from forde_fast.lengthscales import PCA, Cosine, Identity
from forde_fast.rule import Median, Rule, check_bandwidth
from forde_fast.rules import GAL, LIT, SGE
from forde_fast.spaces import Features, InputGradients, Outputs, Weights
from forde_fast.validation import expect, one_of


def per_sample(batch: int) -> float:
    """1 / B: the weight in a batch's function space, whose likelihood is B times the mean cross-entropy."""
    return 1 / batch


@dataclass(frozen=True)
class Cauchy:
    """The prior's penalty sum log(1 + scale f^2) on what a method knows of its members."""

    scale: float

    def __post_init__(self):
        validation.positive(self.scale, "scale")

    def __call__(self, values: Tensor) -> Tensor:
        return (self.scale * values.square()).log1p().sum()


@dataclass(frozen=True)
class Method:
    """space    what is compared (see spaces.py); None: nothing, a deep ensemble
    normalize   scale every particle to norm 1
    bandwidth   of the kernel, as `forde_fast.repulsion` takes it, or another `Rule` (see rules.py)
    lengthscale of the particles' space, where the trainer is given none; None: the identity
    prior       a callable(values) -> [], a penalty on the values that the space makes of all members
    weight      factor of the repulsion and of the prior beside the mean cross-entropy: a number, or a
                callable(B) -> number. The trainer's `repulsion_weight` multiplies the repulsion besides; where that
                is 0 there is no prior either, and nothing is left but a deep ensemble
    """

    space: Callable | None
    normalize: bool = True
    bandwidth: str | float | Median | Rule = "median"
    lengthscale: object = None
    prior: Callable[[Tensor], Tensor] | None = None
    weight: float | Callable[[int], float] = 1.0

    def __post_init__(self):
        expect(self.space is None or callable(self.space), "space", "None or a callable", self.space, TypeError)
        expect(self.prior is None or callable(self.prior), "prior", "None or a callable", self.prior, TypeError)
        check_bandwidth(self.bandwidth)
        validation.lengthscale(self.lengthscale)
        if not callable(self.weight):
            validation.positive(self.weight, "weight", allow_zero=True)

    def weight_at(self, batch: int) -> float:
        """The factor for a batch of so many samples."""
        weight = self.weight(batch) if callable(self.weight) else self.weight
        validation.positive(weight, "weight", allow_zero=True)
        return weight


WHOLE = Median(over="batch", add_one=True)  # one kernel matrix, h = med / log(M + 1)
FUNCTION = Method(Outputs(), normalize=False, bandwidth=WHOLE, prior=Cauchy(1e-6), weight=per_sample)
FEATURE_PRIOR = {"cifar10": 1e-3}  # the published scales; 5e-3 on CIFAR-100 and TinyImageNet

# The scale of each repulsion beside the mean cross-entropy is the published one; "weight-rde" has 1 here and 1 / N,
# N the number of training images, by `make`. The prior of "function-rde" is not published: feature-rde's, on logits.
METHODS = {
    "de": Method(space=None),
    "forde": Method(InputGradients()),
    "weight-rde": Method(Weights(), normalize=False, bandwidth=WHOLE),
    "weight-rde-sge": Method(Weights(), normalize=False, bandwidth=SGE(WHOLE)),
    "function-rde": FUNCTION,
    "function-rde-sge": replace(FUNCTION, bandwidth=SGE(WHOLE)),
    "function-rde-probabilities": replace(FUNCTION, space=Outputs("probabilities"), prior=None),
    "feature-rde": Method(Features(), normalize=False, bandwidth=Median(owner="first", squared=True),
                          prior=Cauchy(5e-3), weight=per_sample),
    "lit": Method(InputGradients("log_probability"), bandwidth=LIT(), weight=0.01),
    "gal": Method(InputGradients("log_probability"), bandwidth=GAL()),
}  # fmt: skip

# FoRDE by its lengthscale: from the training images as the model receives them, and alpha.
LENGTHSCALES: dict[str, Callable[[Tensor, float, int | None], object]] = {
    "forde-identity": lambda images, alpha, rank: Identity(),
    "forde-pca": lambda images, alpha, rank: _pca(images, rank),
    "forde-tuned": lambda images, alpha, rank: _pca(images, rank).blend(alpha),
    "forde-cosine": lambda images, alpha, rank: Cosine.fit(images),
}
WHOLE_PCA, RANK = 12_288, 256
NAMES = (*(name for name in METHODS if name != "forde"), *LENGTHSCALES)
SHARED = {"feature-rde": "head"}  # methods whose members share a layer


def _pca(images: Tensor, rank: int | None) -> PCA:
    if rank is None and images[0].numel() > WHOLE_PCA:
        rank = RANK
    return PCA.fit(images, rank)


def resolve(method: str | Method) -> Method:
    """A Method, or the one of that name; ValueError lists the names."""
    fitted = isinstance(method, str) and method in LENGTHSCALES
    expect(not fitted, "method", "'forde' and its lengthscale, such as PCA.fit(images)", repr(method))
    return method if isinstance(method, Method) else METHODS[one_of(method, "method", METHODS)]


def make(name: str, images: Tensor, alpha: float = 0.4, score: str | Callable = "logit", data: str = "",
         rank: int | None = None) -> Method:  # fmt: skip
    """The Method of one of NAMES for training images [N, ...] as the model receives them.

    alpha  of "forde-tuned": 0 is the identity, 1 PCA
    score  whose input gradient FoRDE compares
    data   the data set's name, for which a prior may be published
    rank   directions of PCA that are kept; None: all up to D = 12,288 (TinyImageNet's), RANK of more
    """
    one_of(name, "method", NAMES)
    if name in LENGTHSCALES:
        return Method(InputGradients(score), lengthscale=LENGTHSCALES[name](images, alpha, rank))
    method = METHODS[name]
    if isinstance(method.space, Weights):
        return replace(method, weight=1 / len(images))
    if name == "feature-rde" and data in FEATURE_PRIOR:
        return replace(method, prior=Cauchy(FEATURE_PRIOR[data]))
    return method
