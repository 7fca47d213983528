"""What the benchmarks of this folder share: where their rows go; the measuring is `forde_fast.timing`."""

from pathlib import Path

from forde_fast.timing import append, interleaved, quantiles, ratio

__all__ = ["RESULTS", "append", "interleaved", "quantiles", "ratio"]

RESULTS = Path(__file__).parent / "results"
