"""Ranks, and their shares of members and samples."""

from __future__ import annotations

import os

from forde_fast.validation import expect


def launched() -> bool:
    """Whether torchrun (or anything that sets what it sets) started this process as one of several."""
    return ranks() > 1 and "MASTER_ADDR" in os.environ


def ranks() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


def lost(error: RuntimeError) -> bool:
    """Whether an error of a collective says that another rank is gone."""
    text = str(error)
    return type(error).__name__.startswith("Dist") or "gloo" in text or "NCCL" in text or "Connection closed" in text


def cut(size: int, parts: int) -> list[slice]:
    """0 to size in so many consecutive parts, the first ones larger by one where it does not divide."""
    whole, rest = divmod(size, parts)
    ends = [whole * i + min(i, rest) for i in range(parts + 1)]
    return [slice(ends[i], ends[i + 1]) for i in range(parts)]


def best_parts(members: int, ranks: int, samples: int | None = None) -> int:
    """Data parts for which the busiest rank has the fewest members x samples; the fewest parts among equals.

    samples  of a batch: each part has one at least
    """
    most = min(ranks, samples or ranks)
    fits = [parts for parts in range(1, most + 1) if ranks % parts == 0 and ranks // parts <= members]
    expect(len(fits) > 0, "ranks", f"fewer, for {members} members and {samples} samples", ranks)
    return min(fits, key=lambda parts: (-(-members // (ranks // parts)) / parts, parts))
