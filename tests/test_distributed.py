"""Members and batch split over processes: what comes out is what one process computes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import mesh_cases
import pytest

from forde_fast.distributed.parts import best_parts, cut


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What `mesh_cases.py` printed; one start of its processes for all tests."""
    script, folder = Path(__file__).with_name("mesh_cases.py"), tmp_path_factory.mktemp("mesh")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, script, folder]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize(("ranks", "parts"), mesh_cases.GRIDS)
def test_ten_published_steps_end_as_in_one_process(found, ranks, parts):
    off = found[f"trajectory of published: {ranks} ranks, {parts} parts"]
    assert off["parameters"] < 1e-10
    assert off["statistics"] < 1e-10
    assert off["log"] < 1e-8


@pytest.mark.parametrize(("ranks", "parts"), mesh_cases.SOME)
@pytest.mark.parametrize("name", mesh_cases.METHODS)
def test_every_method_steps_as_in_one_process(found, name, ranks, parts):
    off = found[f"trajectory of {name}: {ranks} ranks, {parts} parts"]
    assert off["parameters"] < 1e-10
    assert off["statistics"] < 1e-10
    assert off["log"] < 1e-8


def test_shares_cover_all_and_differ_by_one():
    for size, parts in ((10, 4), (3, 3), (7, 2), (2, 5), (0, 2)):
        shares = cut(size, parts)
        assert [i for share in shares for i in range(size)[share]] == list(range(size))
        lengths = [share.stop - share.start for share in shares]
        assert max(lengths) - min(lengths) <= 1
        assert lengths == sorted(lengths, reverse=True)


@pytest.mark.parametrize(
    ("members", "ranks", "samples", "parts"),
    [(10, 1, 128, 1), (10, 5, 128, 1), (10, 8, 128, 4), (4, 3, 128, 3), (4, 8, 128, 2), (10, 1024, 128, 128)],
)
def test_the_busiest_rank_is_left_the_least(members, ranks, samples, parts):
    """Of 10 members on 8 ranks: 8 rows leave a rank 2 members, 2 rows and 4 parts 5 / 4 of one."""
    assert best_parts(members, ranks, samples) == parts
