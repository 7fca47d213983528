"""What the kernels implement of the schemas in forde_fast/operators.py."""

from .at_once import at_once, at_once_low_rank
from .low_rank import coordinates, project
from .repulsion import combine, contrasts, median_rule, pair_distances

__all__ = [
    "at_once",
    "at_once_low_rank",
    "combine",
    "contrasts",
    "coordinates",
    "median_rule",
    "pair_distances",
    "project",
]
