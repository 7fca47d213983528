"""Members and batch split over processes: what comes out is what one process computes."""

import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import mesh_cases
import pytest
import torch.distributed as dist

from forde_fast import scaling
from forde_fast.distributed.parts import best_parts, cut
from forde_fast.distributed.store import fresh


def printed(name: str, *arguments):
    """What a script beside this one prints: its processes start by fork, after the imports, and share no threads
    with pytest."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, Path(__file__).with_name(name), *map(str, arguments)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    return printed("mesh_cases.py", tmp_path_factory.mktemp("mesh"))


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return printed("rank_runs.py", tmp_path_factory.mktemp("runs"))


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


@pytest.mark.parametrize(("ranks", "parts"), mesh_cases.SOME)
@pytest.mark.parametrize("name", mesh_cases.SENT)
def test_a_step_sends_the_bytes_that_the_model_says(found, name, ranks, parts):
    sent = found[f"bytes of {name}: {ranks} ranks, {parts} parts"]
    assert (sent["exchange"] > 0) == (name != "de")
    assert (sent["gradients"] > 0) == (sent["norms"] > 0) == (parts > 1)
    assert sent["off"] == 0


def test_a_step_on_a_timeline_by_hand():
    """Two of four members: each 8 s, 9 s on the link, 16 s when its cotangents are back, 9 s after the other's."""
    step = scaling.Step(4, 4, 100, 10, forward=1.0)
    found = scaling.simulate(step, scaling.Machine(peak=1.0, link=10.0, wide=1.0, latency=1.0), 2, 1)
    waits = {"exchange": 26 - 16 + 9, "gradients": 0, "norms": 0, "small": 2 + (32 + 56) / 10}
    wanted = {"compute": 48, "uneven": 0, **waits, "step": 48 + sum(waits.values())}
    assert found == pytest.approx(wanted)


def test_the_page_has_the_models_tables():
    page = Path(__file__).parents[1].joinpath("docs", "scaling.md").read_text(encoding="utf-8")
    for title, given in scaling.TABLES.items():
        assert f"{title}:\n\n{scaling.as_text(scaling.table(*given))}\n" in page, title


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


def test_ranks_that_start_again_meet_where_nobody_wrote():
    """At a store that outlives them: each start finds a part of its own, in whatever order its ranks come."""
    kept, places = dist.HashStore(), []

    def rank(number: int, delay: float) -> None:
        time.sleep(delay)
        place = fresh(kept, number, 3)
        found.append(place.add("met", 1))

    for start in range(4):
        found = []
        delays = [0.03 * ((number + start) % 3) for number in range(3)]
        ranks = [threading.Thread(target=rank, args=pair) for pair in enumerate(delays)]
        for one in ranks:
            one.start()
        for one in ranks:
            one.join(20)
        places.append(sorted(found))
    assert places == [[1, 2, 3]] * 4  # all three, and none before them


# ---------------------------------------------------------------- runs


def test_a_signal_to_one_rank_stops_all_at_the_same_step(runs):
    assert runs["stopped"] == [143, 143]
    assert runs["kept"] == 10  # it came in step 9; all ranks know of it a step later


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_a_checkpoint_is_read_by_any_number_of_ranks(runs, ranks):
    assert runs[f"off as {ranks}"] < 1e-6  # in float32
    assert runs["same bytes"]  # by as many as wrote it


def test_a_full_disk_of_one_rank_stops_all_and_loses_nothing(runs):
    assert runs["full"] == [1, 1]
    assert runs["kept before"] == 9
    assert runs["off after"] == 0


def test_torchrun_restarts_from_the_last_checkpoint(runs):
    """By `--max-restarts`, after one of its two workers was killed in step 20."""
    (step,) = runs["went on after"]
    assert 15 <= step <= 18  # what was not yet on the disk of both is lost
    assert runs["off after the restart"] == 0


def test_runs_after_one_another_share_the_ranks(runs):
    assert runs["off beside another"] == 0


def test_what_is_not_split_says_so_under_torchrun(runs):
    assert "error: info: expected one process, got 2" in runs["refused"]


def test_runs_of_two_ranks_that_are_killed_end_as_one_that_was_not(tmp_path):
    killed, _ = printed("kill_runs.py", tmp_path, 2, 2)
    assert killed == 2
