"""M members of any nn.Module, their trainable parameters views of one flat buffer [M, P]."""

from __future__ import annotations

import contextlib
import numbers
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.func import functional_call

from forde_fast.evaluation import decompose
from forde_fast.modes import evaluation_mode
from forde_fast.types import Prediction
from forde_fast.validation import expect, refuse, whole

AS_BUILT = (  # of errors
    "ensemble",
    "the trainable parameters with which it was built (freeze before building it), or "
    "a new one, Ensemble.from_modules(ensemble.members)",
)
FROZEN = "some that are frozen now"


class Ensemble(nn.Module):
    """Members made by `make_model()` one after another, from one seed; member 0 is what the seed alone gives.

    flat   [M, P], the trainable parameters of all members: a member's parameters are views of its row, in the
           order of `named_parameters()`. Frozen ones (requires_grad=False) stay outside
    leaves [M], a member's trainable parameters in that order
    sizes  [M], how many numbers those are: members may differ, in their heads or altogether. P is the largest one's,
           and the rest of a smaller one's row stays 0
    shared names of layers that all members have in common, by default none: they start as member 0's, and every step
           moves them by the mean of the members' gradients, so that the copies stay the same

    Called on x it returns the members' outputs [M, B, K]. Raises TypeError or ValueError for members = 0 and
    for members whose trainable parameters differ in dtype or device.
    """

    def __init__(self, make_model: Callable[[], nn.Module], members: int = 10, seed: int = 0,
                 shared: str | Sequence[str] = ()):  # fmt: skip
        makes = callable(make_model) and not isinstance(make_model, nn.Module)
        got = type(make_model).__name__
        expect(makes, "make_model", "a callable that returns a new module each time", got, TypeError)
        whole(members, "members")
        whole(seed, "seed", least=0)
        with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
            torch.manual_seed(seed)
            modules = [make_model() for _ in range(members)]
        super().__init__()
        self._adopt(modules, shared)

    @classmethod
    def from_modules(cls, modules: Sequence[nn.Module], shared: str | Sequence[str] = ()) -> Ensemble:
        """The given modules as members; their parameters become views of the ensemble's buffer."""
        ensemble = cls.__new__(cls)
        nn.Module.__init__(ensemble)
        ensemble._adopt(list(modules), shared)
        return ensemble

    def _adopt(self, modules: list[nn.Module], shared: str | Sequence[str]) -> None:
        expect(len(modules) >= 1, "modules", "at least one", "none")
        for module in modules:
            expect(isinstance(module, nn.Module), "modules", "torch.nn.Module", type(module).__name__, TypeError)
        expect(len({id(m) for m in modules}) == len(modules), "modules", "distinct modules", "one of them twice")
        self.members = nn.ModuleList(modules)
        self.training = all(module.training for module in modules)  # if not, the trainer sees to it
        for number, module in enumerate(modules):
            expect(len(trainable(module)) > 0, f"modules[{number}]", "some trainable parameters", "none")
        kinds = {f"{p.dtype} on {p.device}" for module in modules for _, p in trainable(module)}
        expect(len(kinds) == 1, "modules", "one dtype and device", ", ".join(sorted(kinds)))
        own = [id(p) for module in modules for _, p in trainable(module)]
        common = "one that several members share (shared= names layers that they have in common)"
        expect(len(set(own)) == len(own), "modules", "trainable parameters of their own", common)
        self._flatten()
        self.shared = (shared,) if isinstance(shared, str) else tuple(shared)
        self.shared_parts = [part for layer in self.shared for part in self._parts(layer)]
        for part in self.shared_parts:
            self.flat[:, part] = self.flat[0, part].clone()

    @torch.no_grad()
    def average_shared_(self, g: Tensor) -> None:
        """The gradients [M, P] of what the members have in common become their mean, in place."""
        for part in self.shared_parts:
            g[:, part] = g[:, part].mean(0)

    def _parts(self, layer: str) -> list[slice]:
        """Where a layer's parameters are in `flat`."""
        expect(self.uniform, "shared", "members with the same parameters", "members that differ")
        parts, start = [], 0
        for name, p in trainable(self.members[0]):
            if name == layer or name.startswith(f"{layer}."):
                parts.append(slice(start, start + p.numel()))
            start += p.numel()
        expect(len(parts) > 0, "shared", "the name of a layer with trainable parameters", repr(layer))
        return parts

    @property
    def uniform(self) -> bool:
        """Whether all members have trainable parameters of the same names and shapes: row by row the same entries."""
        return len({tuple((n, p.shape) for n, p in trainable(member)) for member in self.members}) == 1

    def _flatten(self) -> None:
        self.leaves = [[p for _, p in trainable(member)] for member in self.members]
        rows = [torch.cat([p.detach().flatten() for p in own]) for own in self.leaves]
        self.sizes = [len(row) for row in rows]
        self.flat = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)  # zeros after a smaller member's
        for row, module in zip(self.flat, self.members, strict=True):
            for p, view in split_row(row, module):
                p.data = view

    def check_built(self) -> None:
        """ValueError unless what is trainable now are the views of `flat` that were made of it: what steps move."""
        storage = self.flat.untyped_storage().data_ptr()
        for number, (row, leaves, member) in enumerate(zip(self.flat, self.leaves, self.members, strict=True)):
            named, start = trainable(member), row.storage_offset()
            expect(all(leaf.requires_grad for leaf in leaves), *AS_BUILT, FROZEN)
            expect(len(named) == len(leaves), *AS_BUILT, f"{len(named)} in member {number}, not {len(leaves)}")
            for (name, p), leaf in zip(named, leaves, strict=True):
                same = p is leaf and p.untyped_storage().data_ptr() == storage and p.storage_offset() == start
                if not same:
                    refuse(*AS_BUILT, f"another {name} in member {number}")
                start += p.numel()

    def _apply(self, fn, recurse=True):
        super()._apply(fn, recurse)  # moves or casts parameter by parameter: they are no views afterwards
        self._flatten()
        return self

    def __setstate__(self, state):
        super().__setstate__(state)  # copy.deepcopy and pickle copy parameter by parameter, as above
        self._flatten()

    def load_state_dict(self, state_dict, strict: bool = True, assign: bool = False):
        expect(not assign, "assign", "False, since parameters stay views of `flat`", assign)
        return super().load_state_dict(state_dict, strict)

    def check_state(self, tensors: dict[str, Tensor]) -> None:
        """Raise ValueError, naming the first that is odd, unless these are this ensemble's parameters and buffers."""
        own = {name: tuple(tensor.shape) for name, tensor in self.state_dict().items()}
        found = {name: tuple(getattr(tensor, "shape", ("no tensor",))) for name, tensor in tensors.items()}
        odd = sorted(name for name in own.keys() | found.keys() if own.get(name) != found.get(name))
        if odd:
            refuse("state", f"the ensemble's {odd[0]} {own.get(odd[0])}", found.get(odd[0]))

    def __len__(self) -> int:
        return len(self.members)

    def member(self, index: int) -> nn.Module:
        """An ordinary nn.Module; its parameters stay those of the ensemble (deepcopy it to part from it)."""
        known = isinstance(index, numbers.Integral) and -len(self) <= index < len(self)
        expect(known, "index", f"a member from 0 to {len(self) - 1}", repr(index), IndexError)
        return self.members[index]

    def functional(self, index: int, parameters: Tensor, buffers: dict[str, Tensor] | None = None):
        """Member `index` as a function of x, with `parameters` [P] in its graph.

        buffers  in place of the member's own; written where the module writes in place, as BatchNorm does
        """
        named = trainable(self.members[index])
        size = sum(p.numel() for _, p in named)
        expect(size == self.sizes[index], *AS_BUILT, f"{size} numbers, not {self.sizes[index]}")
        views = split_row(parameters, self.members[index])
        tensors = {name: view for (name, _), (_, view) in zip(named, views, strict=True)}
        return lambda x: functional_call(self.members[index], {**tensors, **(buffers or {})}, (x,))

    def forward(self, x: Tensor) -> Tensor:
        outputs = [member(x) for member in self.members]
        kinds = {type(own).__name__ for own in outputs if not isinstance(own, Tensor)}
        expect(not kinds, "modules", "networks whose output is a tensor [B, ...]", ", ".join(kinds), TypeError)
        shapes = [list(own.shape) for own in outputs]
        odd = next((shape for shape in shapes if shape != shapes[0]), None)
        expect(odd is None, "modules", f"one shape of output, {shapes[0]}", odd)
        return torch.stack(outputs)

    @torch.no_grad()
    def predict_members(self, x: Tensor, batch_size: int | None = None) -> Tensor:
        """x [B, ...] -> each member's softmax [M, B, K], in evaluation mode; the modes are restored.

        The softmax of half-precision outputs is taken in float32. batch_size: how many of B at a time; None chooses.
        """
        expect(isinstance(x, Tensor), "x", "a torch.Tensor", type(x).__name__, TypeError)
        if batch_size is None:
            batch_size = _suited(x)
        whole(batch_size, "batch_size")
        with evaluation_mode(self), untouched(x):
            return torch.cat([_wide(self(part)).softmax(-1) for part in x.split(batch_size)], dim=1)

    def predict_proba(self, x: Tensor, batch_size: int | None = None) -> Tensor:
        """x [B, ...] -> [B, K], the mean of the members' softmax."""
        return self.predict_members(x, batch_size).mean(0)

    def predict(self, x: Tensor, batch_size: int | None = None) -> Prediction:
        """x [B, ...] -> mean [B, K] and members' [M, B, K] probabilities, total, aleatoric and epistemic uncertainty
        [B] in nats, as `evaluation.uncertainty` has them."""
        members = self.predict_members(x, batch_size)
        return Prediction(members.mean(0), members, **decompose(members))


@contextlib.contextmanager
def untouched(x: Tensor) -> Iterator[None]:
    """ValueError where what runs in here has changed x in place: the next member would be given another input."""
    version = None if x.is_inference() else x._version
    yield
    same = version is None or x._version == version
    expect(same, "modules", "networks that leave their input as it is", "one that changes it in place")


def _suited(x: Tensor) -> int:
    """As many samples at a time as a CPU's cache holds between two layers: a resnet takes twice as long for more. A
    GPU and small samples ask for many, for what each call costs."""
    if x.device.type != "cpu":
        return 1024
    return min(1024, max(32, (1 << 18) // max(1, x[:1].numel())))


def _wide(outputs: Tensor) -> Tensor:
    return outputs.float() if outputs.dtype.itemsize < 4 else outputs


def split_row(row: Tensor, module: nn.Module) -> list[tuple[nn.Parameter, Tensor]]:
    """A module's trainable parameters with their views of `row` [P], of which a part may be left over."""
    parameters = [p for _, p in trainable(module)]
    sizes = [p.numel() for p in parameters]
    views = row[: sum(sizes)].split(sizes)
    return [(p, view.view(p.shape)) for p, view in zip(parameters, views, strict=True)]


def trainable(module: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """The parameters that are trained, with their names, in the order in which `flat` holds them."""
    return [(name, p) for name, p in module.named_parameters() if p.requires_grad]
