"""Members and batch split over processes: `torchrun --nproc-per-node 4 -m forde_fast train ...`."""

from forde_fast.distributed.mesh import Mesh
from forde_fast.distributed.parts import best_parts, launched, lost, ranks
from forde_fast.distributed.store import part

__all__ = ["Mesh", "best_parts", "launched", "lost", "part", "ranks"]
