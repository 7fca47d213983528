"""First-order repulsive deep ensembles with fused kernels.

Trinh, Heinonen, Acerbi, Kaski: Input-gradient space particle inference for neural network ensembles, ICLR 2024.
"""

from forde_fast import data, methods, models
from forde_fast.checkpoint import load_ensemble, save_ensemble, save_member
from forde_fast.data import corrupt
from forde_fast.ensemble import Ensemble
from forde_fast.evaluation import score
from forde_fast.lengthscales import PCA, Cosine, Identity
from forde_fast.methods import Method
from forde_fast.repulsion import available_backends, combine, distances, repulsion
from forde_fast.rule import Median
from forde_fast.rules import GAL, LIT, SGE
from forde_fast.second_order import Acceleration, accelerate, decelerate
from forde_fast.spaces import Features, InputGradients, Outputs, Weights
from forde_fast.trained import load_run
from forde_fast.trainer import Log, Trainer
from forde_fast.types import Backend, Prediction, Repulsion

__all__ = [
    "GAL",
    "LIT",
    "PCA",
    "SGE",
    "Acceleration",
    "Backend",
    "Cosine",
    "Ensemble",
    "Features",
    "Identity",
    "InputGradients",
    "Log",
    "Median",
    "Method",
    "Outputs",
    "Prediction",
    "Repulsion",
    "Trainer",
    "Weights",
    "accelerate",
    "available_backends",
    "combine",
    "corrupt",
    "data",
    "decelerate",
    "distances",
    "load_ensemble",
    "load_run",
    "methods",
    "models",
    "repulsion",
    "save_ensemble",
    "save_member",
    "score",
]
