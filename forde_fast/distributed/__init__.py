"""Members and batch split over processes: `torchrun --nproc-per-node 4 -m forde_fast train ...`."""

from forde_fast.distributed.mesh import Mesh, launched

__all__ = ["Mesh", "launched"]
