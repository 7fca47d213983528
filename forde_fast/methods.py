"""The methods: each is a space, a way to weigh differences in it, and a bandwidth rule."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from forde_fast.lengthscales import PCA, Identity, Lengthscale
from forde_fast.rule import Median, check_bandwidth
from forde_fast.spaces import InputGradients
from forde_fast.validation import expect, one_of


@dataclass(frozen=True)
class Method:
    """space  what is compared (see spaces.py); None: nothing, a deep ensemble
    normalize  scale every particle to norm 1
    bandwidth  of the kernel, as `forde_fast.repulsion` takes it
    """

    space: Callable | None
    normalize: bool = True
    bandwidth: str | float | Median = "median"

    def __post_init__(self):
        expect(self.space is None or callable(self.space), "space", "None or a callable", self.space, TypeError)
        check_bandwidth(self.bandwidth)


METHODS = {"de": Method(space=None), "forde": Method(space=InputGradients())}

# What the command line offers: a method, and the lengthscale made from the training images.
RECIPES: dict[str, tuple[str, Callable[[Tensor, float], Lengthscale | None]]] = {
    "de": ("de", lambda images, alpha: None),
    "forde-identity": ("forde", lambda images, alpha: Identity()),
    "forde-pca": ("forde", lambda images, alpha: PCA.fit(images)),
    "forde-tuned": ("forde", lambda images, alpha: PCA.fit(images).blend(alpha)),
}


def resolve(method: str | Method) -> Method:
    """A Method, or the one of that name; ValueError lists the names."""
    return method if isinstance(method, Method) else METHODS[one_of(method, "method", METHODS)]
