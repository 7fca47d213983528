"""An sdist has every file that git knows."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.skipif(not (ROOT / ".git").exists() or shutil.which("git") is None, reason="needs a git checkout")
def test_an_sdist_has_every_file_that_git_knows(tmp_path):
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, check=True, capture_output=True, text=True).stdout
    command = [sys.executable, "setup.py", "-q", "egg_info", "--egg-base", tmp_path]  # which lists what sdist packs
    subprocess.run(command, cwd=ROOT, check=True, env={**os.environ, "FORDE_FAST_BUILD": "0"})  # as without torch
    listed = (tmp_path / "forde_fast.egg-info/SOURCES.txt").read_text().splitlines()
    wanted = {name for name in tracked.splitlines() if not name.startswith(".") and (ROOT / name).exists()}
    assert wanted - set(listed) == set()
