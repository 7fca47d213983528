"""What one training run is: a TOML file, flags over it, and the checks that come before any work."""

from __future__ import annotations

import dataclasses
import json
import tomllib
from dataclasses import dataclass
from pathlib import Path

from forde_fast import validation
from forde_fast.data import CORRUPTIONS, DATASETS, UNKNOWN
from forde_fast.data.datasets import check_image_size
from forde_fast.methods import NAMES
from forde_fast.models import MODELS
from forde_fast.repulsion import BACKENDS, available_backends
from forde_fast.spaces import SCORES
from forde_fast.strategies import KINDS, PRECISIONS
from forde_fast.validation import expect, reason_of

BUNDLED = ("fashion-mini", "digits")


def _setting(default, text: str):
    """A field with what the command line says of it."""
    return dataclasses.field(default=default, metadata={"help": text})


@dataclass(frozen=True)
class TrainConfig:
    """One run. The defaults are a small trial on the images that come with the package.

    They are not the published strength: repulsion_weight is 1 there, and with 50,000 images and batches of 128
    that is 391 in units of the posterior's repulsion, which here takes a weight of 20 or more.
    """

    data: str = _setting("fashion-mini", f"one of {', '.join(DATASETS)}")
    data_dir: str | None = _setting(None, "folder or file of a data set that does not come with the package")
    image_size: int | None = _setting(
        None, "pixels of a side to which the images of --data folder are scaled and cut; default: they have one size"
    )
    download: bool = _setting(False, "fetch the data where they have a public address")
    train_size: int | None = _setting(None, "only the first so many training images")
    test_size: int | None = _setting(None, "only the first so many test images, each scored under every corruption")
    validation: float = _setting(0.0, "share of each class's training images held out, and scored after every epoch")
    corrupted_dir: str | None = _setting(
        None, "CIFAR-10-C's folder or .tar, or one like it, in place of corruptions made here"
    )
    corruptions: str | None = _setting(
        None, "that test images are scored under: names such as fog,snow, or all, or none; default: all"
    )
    ood: str | None = _setting(None, "sets of unknown images, such as noise,digits: how well uncertainty tells them")
    ood_dir: str | None = _setting(None, "where such a set lies that does not come with the package")
    model: str = _setting("mlp", f"one of {', '.join(MODELS)}")
    width: int | None = _setting(None, "of the model's layers; default: the model's own")
    members: int = _setting(5, "networks in the ensemble")
    method: str = _setting("forde-pca", f"one of {', '.join(NAMES)}")
    alpha: float = _setting(0.4, "of forde-tuned: 0 is the identity, 1 PCA")
    rank: int | None = _setting(None, "directions of PCA that are kept; default: all, or 256 where D > 12,288")
    repulsion_weight: float = _setting(20.0, "w, the factor on the repulsion; 1 is the published one on CIFAR")
    score: str = _setting("logit", f"whose input gradient is compared, one of {', '.join(SCORES)}")
    backend: str = _setting("auto", f"of the repulsion operation, one of auto, {', '.join(BACKENDS)}")
    strategy: str = _setting(
        "loop",
        f"how the members are computed, one of auto, {', '.join(KINDS)}; auto takes the fastest, whose last "
        "bits may be others each time",
    )
    members_at_a_time: int | None = _setting(
        None, "whose graphs are alive at once: less memory, up to half more time; default: all"
    )
    precision: str = _setting("full", f"of the networks' passes, one of {', '.join(PRECISIONS)}")
    repulsion_every: int = _setting(1, "steps from one with repulsion to the next; with as many times its weight")
    epochs: int = _setting(20, "passes over the training images")
    lr: float = _setting(0.1, "learning rate, held for half of the epochs and then falling to 1 % of it")
    weight_decay: float = _setting(5e-4, "of SGD")
    batch_size: int = _setting(128, "images in a step")
    augment: bool = _setting(False, "random crop with padding 4, and flip")
    checkpoint_every: int | None = _setting(None, "steps between checkpoints, besides one after every epoch")
    tensorboard: bool = _setting(False, "write event files into the run's folder too")
    data_parts: int | None = _setting(
        None, "under torchrun: ranks that share a member's batch; the others share the members"
    )
    sync_batchnorm: bool = _setting(True, "under torchrun: over the parts of a batch, as in one process")
    seed: int = _setting(0, "of the members' start and the order of images")
    device: str = _setting("auto", "such as cpu, cuda, cuda:1; auto: a GPU where there is one")
    out: str = _setting("runs/first", "folder of the run")

    def __post_init__(self):
        for name, field in FIELDS.items():
            value, kind = getattr(self, name), kind_of(name)
            right = type(value) is kind or (kind is float and type(value) is int)
            right |= value is None and field.type.endswith("| None")
            expect(right, name, kind.__name__, repr(value)[:80], TypeError)
        expect(self.out != "", "out", "a folder", "an empty name")
        for name, valid in (
            ("data", DATASETS),
            ("model", MODELS),
            ("method", NAMES),
            ("score", SCORES),
            ("backend", ("auto", *BACKENDS)),
            ("strategy", ("auto", *KINDS)),
            ("precision", PRECISIONS),
        ):
            validation.one_of(getattr(self, name), name, valid)
        for name in (
            "train_size",
            "test_size",
            "width",
            "rank",
            "members",
            "epochs",
            "batch_size",
            "checkpoint_every",
            "repulsion_every",
            "data_parts",
            "members_at_a_time",
        ):
            value = getattr(self, name)
            if value is not None:
                validation.whole(value, name)
        for name, value in vars(self).items():  # a path of another encoding would not come back from config.toml
            whole = not isinstance(value, str) or value == value.encode("utf-8", "replace").decode()
            expect(whole, name, "text in UTF-8", ascii(value)[:80])
        validation.whole(self.seed, "seed", least=0)
        validation.positive(self.lr, "lr")
        validation.positive(self.weight_decay, "weight_decay", allow_zero=True)
        validation.positive(self.repulsion_weight, "repulsion_weight", allow_zero=True)
        expect(0 <= self.validation < 1, "validation", "a share from 0 to below 1", self.validation)
        expect(0 <= self.alpha <= 1, "alpha", "a number from 0 to 1", self.alpha)
        image_model = f"mlp, the only one for features of --data {self.data}"
        expect(self.data != "table" or self.model == "mlp", "model", image_model, self.model)
        for name in validation.names_in(self.ood) if self.ood else ():
            validation.one_of(name, "ood", UNKNOWN)
        own = f"none for {self.data}, which comes with the package (your own: --data folder, npz or table)"
        expect(self.data not in BUNDLED or self.data_dir is None, "data_dir", own, self.data_dir)
        chosen = self.corrupted_by(CORRUPTIONS)
        for name in chosen:
            validation.one_of(name, "corruptions", CORRUPTIONS)
        expect(len(set(chosen)) == len(chosen), "corruptions", "each once", self.corruptions)
        whole = self.corruptions in (None, "all", "none")
        expect(self.data != "table" or whole, "corruptions", "none for a table of features", self.corruptions)
        for name in ("corrupted_dir", "ood"):
            held = getattr(self, name)
            expect(self.data != "table" or not held, name, "none for a table of features", held)
        check_image_size(self.image_size, self.data)
        expect(self.data != "table" or not self.augment, "augment", "no augmentation of features", self.augment)
        if self.backend != "auto":
            backend = available_backends()[self.backend]
            expect(bool(backend), "backend", "one that is usable here", f"{self.backend}: {backend}")

    def corrupted_by(self, every: tuple[str, ...]) -> tuple[str, ...]:
        """The names in `corruptions`, with `every` as all of them."""
        if self.corruptions in (None, "all"):
            return every
        return () if self.corruptions == "none" else validation.names_in(self.corruptions)


# What does not change what a run computes, and may be another when it is resumed.
MOVABLE = (
    "data_dir", "corrupted_dir", "corruptions", "ood", "ood_dir", "download", "checkpoint_every", "tensorboard",
    "data_parts", "members_at_a_time", "device", "out",
)  # fmt: skip

FIELDS = {field.name: field for field in dataclasses.fields(TrainConfig)}


def kind_of(name: str) -> type:
    """The type of a field's value: str, int, float or bool."""
    return {"str": str, "int": int, "float": float, "bool": bool}[FIELDS[name].type.removesuffix(" | None")]


def read(path: str | Path) -> dict:
    """The settings of a TOML file, each a field of TrainConfig of its type. Raises FileNotFoundError, ValueError."""
    expect(Path(path).is_file(), "config", "a TOML file", path, FileNotFoundError)
    try:
        settings = tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # also of too many digits, or brackets in brackets
        raise ValueError(f"config: expected TOML, got {path} ({reason_of(error)})") from None
    for name, value in settings.items():
        validation.one_of(name, f"config {path}", FIELDS)
        if kind_of(name) is float and type(value) is int:
            settings[name] = value = float(value)
        expect(type(value) is kind_of(name), name, f"{kind_of(name).__name__} in {path}", repr(value)[:80])
    return settings


def resumed(settings: dict, folder: Path) -> dict:
    """The settings of the run in `folder`, with those of MOVABLE from `settings`, which must agree otherwise.

    A folder without a run leaves them as they are. Raises ValueError where they do not agree.
    """
    path = folder / "config.toml"
    if not path.exists():
        return settings
    held = read(path)
    for name, value in settings.items():
        kept = held.get(name, FIELDS[name].default)
        expect(name in MOVABLE or value == kept, name, f"{kept!r} as in {path}", repr(value))
    moved = {name: value for name, value in settings.items() if name in MOVABLE}
    return {**held, **moved, "out": str(folder)}  # the folder may have been renamed


def to_toml(config: TrainConfig) -> str:
    """The configuration as TOML; what is None is left out. A JSON string, number or boolean is TOML too."""
    settings = dataclasses.asdict(config)
    texts = {name: json.dumps(value, ensure_ascii=False) for name, value in settings.items() if value is not None}
    return "".join(f"{name} = {text}\n" for name, text in texts.items()).replace("\x7f", "\\u007f")
