"""How differences of particles are weighed: the symmetric matrix C in d = (s_i - s_j)^T C (s_i - s_j).

A lengthscale offers `coordinates` (the definition, for the oracle), `product` (S C by the fewest operations, for
the backends) and `dimension`. Any object with these three is one; `factors` is for those of a low rank.
Source: Trinh et al., ICLR 2024, section 3.3.
"""

from forde_fast.lengthscales.base import Identity, Lengthscale
from forde_fast.lengthscales.cosine import Cosine
from forde_fast.lengthscales.pca import PCA

__all__ = ["PCA", "Cosine", "Identity", "Lengthscale"]
