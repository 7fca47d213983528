"""What a table is: data, network, methods, and what is tuned. Small ones for two cores; the paper's by name."""

from __future__ import annotations

from dataclasses import dataclass, replace

from forde_fast import methods, validation
from forde_fast.data import DATASETS
from forde_fast.models import MODELS
from forde_fast.validation import expect

PAPER = ("de", "weight-rde", "function-rde", "feature-rde", "lit", "forde-pca", "forde-identity", "forde-tuned")
ALL = (*PAPER, "weight-rde-sge", "gal", "forde-cosine")
PUBLISHED = ("de", "forde-identity", "forde-pca", "forde-tuned")  # rows at w = 1 and the published weight decay

# repulsion_weight in units of the published strength, by what repels, the one first that the search begins with; a
# deep ensemble has none. FoRDE's: from what is published to beyond where w N/B of small data is what it is on CIFAR,
# 391. Below them lies w = 0, the deep ensemble.
WEIGHTS = {"forde": (20.0, 1.0, 5.0, 80.0), "weight": (1.0, 10.0, 100.0), "lit": (1.0, 10.0, 100.0, 1000.0)}
OTHER_WEIGHTS = (0.1, 1.0, 10.0)


@dataclass(frozen=True)
class Table:
    """seeds       0 to seeds - 1: the same for all methods, with the same first members and batches
    tuning_seeds   seeds of the runs that choose weight decay, w and alpha
    spread         each corrupted test image at one severity, the five in turn, not at each: a fifth of the work
    strategy, epochs, ...   as `forde_fast.config.TrainConfig` has them
    """

    data: str
    model: str
    width: int | None = None
    members: int = 5
    seeds: int = 3
    methods: tuple[str, ...] = PAPER
    published: tuple[str, ...] = PUBLISHED
    epochs: int = 20
    lr: float = 0.1
    batch_size: int = 128
    augment: bool = False
    train_size: int | None = None
    test_size: int | None = None
    strategy: str = "stacked"
    weight_decays: tuple[float, ...] = (5e-4, 2e-3, 5e-3)
    alphas: tuple[float, ...] = (0.4, 0.1, 0.8)
    tuning_seeds: int = 1
    validation: float = 0.2
    spread: bool = False

    def __post_init__(self):
        validation.one_of(self.data, "data", DATASETS)
        validation.one_of(self.model, "model", MODELS)
        for name in ("members", "seeds", "epochs", "tuning_seeds"):
            validation.whole(getattr(self, name), name)
        for name in (*self.methods, *self.published):
            validation.one_of(name, "methods", methods.NAMES)
        expect("de" in self.methods, "methods", "de among them, with which the others are compared", self.methods)
        expect(set(self.published) <= set(self.methods), "published", "some of the methods", self.published)

    def weights(self, method: str) -> tuple[float, ...]:
        """The candidates for w, the one first that the search begins with."""
        return (1.0,) if method == "de" else WEIGHTS.get(method.split("-")[0], OTHER_WEIGHTS)


DIGITS = Table("digits", "mlp", width=64, seeds=10, methods=ALL, epochs=15)
FASHION = Table("fashion-mnist", "mlp", seeds=10, methods=ALL, train_size=6000, epochs=4, spread=True,
                weight_decays=(5e-4, 5e-3), published=("de", "forde-pca"))  # fmt: skip
RESNET = {"members": 10, "seeds": 5, "epochs": 300, "augment": True, "strategy": "auto"}

TABLES = {
    "small": Table("fashion-mini", "mlp", epochs=10, spread=True, weight_decays=(5e-4, 5e-3), alphas=(0.4, 0.8)),
    "digits-mlp": DIGITS,
    "digits-cnn": replace(DIGITS, model="cnn", width=4, epochs=8, weight_decays=(5e-4, 5e-3),
                          published=("de", "forde-pca")),
    "fashion-mlp": FASHION,
    "fashion-cnn": replace(FASHION, model="cnn", width=4, batch_size=64, weight_decays=(5e-4, 1e-4, 5e-3)),
    "fashion-resnet18": Table("fashion-mnist", "resnet18", members=10, strategy="auto", epochs=30),
    "cifar10": Table("cifar10", "resnet18", **RESNET),
    "cifar100": Table("cifar100", "resnet18", **RESNET),
    "tinyimagenet": Table("tiny-imagenet", "preactresnet18", **{**RESNET, "epochs": 150}),
}  # fmt: skip
