"""What the benchmarks of this folder share: their options; the measuring is `forde_fast.timing`."""

import argparse
from pathlib import Path

import torch

from forde_fast.timing import append, interleaved, quantiles, ratio

__all__ = ["RESULTS", "append", "interleaved", "options", "quantiles", "ratio"]

RESULTS = Path(__file__).parent / "results"


def options(description: str, rounds: int) -> argparse.Namespace:
    """--device, --rounds and --out, as every benchmark has them."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cpu", "cuda"))
    parser.add_argument("--rounds", type=int, default=rounds)
    parser.add_argument("--out", type=Path, default=RESULTS, help="the folder of the CSV file")
    return parser.parse_args()
