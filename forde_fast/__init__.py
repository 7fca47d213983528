"""First-order repulsive deep ensembles with fused kernels.

Trinh, Heinonen, Acerbi, Kaski: Input-gradient space particle inference for neural network ensembles, ICLR 2024.
"""

from forde_fast.lengthscales import PCA, Identity
from forde_fast.repulsion import available_backends, combine, distances, repulsion
from forde_fast.rule import Median
from forde_fast.types import Backend, Repulsion

__all__ = ["PCA", "Backend", "Identity", "Median", "Repulsion", "available_backends", "combine", "distances", "repulsion"]
