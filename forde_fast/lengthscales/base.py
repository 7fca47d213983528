"""What all lengthscales share: files, blends; and the identity."""

from __future__ import annotations

import numbers
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from forde_fast import validation
from forde_fast.files import write
from forde_fast.validation import expect, reason_of


class Lengthscale:
    """Base of the lengthscales: saving and loading."""

    def save(self, path: str | Path) -> None:
        """Write to a safetensors file; what was there before is replaced only when all is written."""
        tensors = {name: tensor.contiguous() for name, tensor in self._tensors().items()}
        write(path, save(tensors, metadata={"forde_fast.lengthscale": type(self).__name__}))

    @classmethod
    def load(cls, path: str | Path) -> Lengthscale:
        """Read what `save` wrote. Raises FileNotFoundError, and ValueError for a file of another kind."""
        expect(Path(path).is_file(), "path", "a file saved by a lengthscale", path, FileNotFoundError)
        try:
            with safe_open(path, framework="pt") as file:
                kind = (file.metadata() or {}).get("forde_fast.lengthscale")
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except SafetensorError as error:
            raise ValueError(
                f"path: expected a lengthscale in safetensors, got {path} ({reason_of(error)})"
            ) from None
        wanted = {k.__name__: k for k in Lengthscale.__subclasses__() if issubclass(k, cls)}
        expect(kind in wanted, "path", f"a file holding {' or '.join(wanted)}", f"{path}: {kind}")
        try:
            return wanted[kind](**tensors)
        except TypeError as error:  # other names or types
            raise ValueError(f"path: expected what a {kind} keeps, got {path} ({reason_of(error)})") from None

    def _tensors(self) -> dict[str, Tensor]:
        """The arguments of the constructor."""
        raise NotImplementedError


class Identity(Lengthscale):
    """C = I: FoRDE-Identity."""

    dimension = None  # any D

    def blend(self, alpha: float, form: str = "arithmetic") -> Identity:
        """The identity itself: both ends of the blend are."""
        check_blend(alpha, form)
        return self

    def coordinates(self, s: Tensor) -> Tensor:
        return s

    def product(self, s: Tensor) -> Tensor:
        return s

    def _tensors(self):
        return {}

    def __repr__(self):
        return "Identity()"


def check_blend(alpha: float, form: str) -> None:
    validation.one_of(form, "form", ("arithmetic", "harmonic"))
    good = isinstance(alpha, numbers.Real) and 0 <= alpha <= 1
    expect(good, "alpha", "a number from 0 to 1", alpha)


def blended(weights: Tensor, alpha: float, form: str) -> Tensor:
    """Weights between 1 (alpha = 0) and themselves (alpha = 1), exact at both ends.

    form "arithmetic" is (1 - alpha) + alpha lambda, "harmonic" 1 / ((1 - alpha) + alpha / lambda), the blend of the
    lengthscales of the paper's appendix D.4. Between 0 and 1 both depend on the scale of lambda.
    """
    check_blend(alpha, form)
    if alpha == 0:
        return weights.new_ones(weights.shape)
    if form == "arithmetic":
        return (1 - alpha) + alpha * weights
    return weights / ((1 - alpha) * weights + alpha)  # 0 stays 0
