"""python rank_runs.py FOLDER: runs of several processes that are stopped and go on as another number of them.

Prints, as JSON, what `test_distributed.py` looks at. Under torchrun it is a worker, `forde-fast` with what it is
given; of `train` one process is killed.
"""

import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import kill_runs
import torch
from safetensors.torch import load_file

from forde_fast import checkpoint, cli, models
from forde_fast.trainer import Trainer


def at_step(number: int, act):
    """In rank 1, after so many steps."""

    def prepare(rank: int) -> None:
        original = Trainer.step

        def step(self, *given):
            log = original(self, *given)
            if self.steps == number:
                act()
            return log

        if rank == 1:
            Trainer.step = step

    return prepare


def full_disk() -> None:
    def write(path, content):
        raise OSError(errno.ENOSPC, "No space left on device")

    checkpoint.write = write


def off(folder: Path, other: Path) -> float:
    """How far the members of two runs are apart, relatively."""
    own, wanted = (load_file(each / "checkpoint.safetensors") for each in (folder, other))
    own, wanted = (torch.cat([each[name].double().flatten() for name in sorted(wanted)]) for each in (own, wanted))
    return float((own - wanted).norm() / wanted.norm())


def under_torchrun(*arguments: str, restarts: int = 0) -> subprocess.CompletedProcess:
    """What torchrun and two workers say."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["--max-restarts", str(restarts), __file__, *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=600)


def worker(command: str, *flags: str) -> None:
    if command == "train" and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        at_step(20, lambda: os.kill(os.getpid(), signal.SIGKILL))(int(os.environ["RANK"]))
    sys.exit(cli.main([command, *flags]))


def main(folder: Path) -> None:
    found = {}
    for ranks in (1, 2):
        assert kill_runs.finished(kill_runs.start(folder / f"whole{ranks}", False, ranks))
    stopped = folder / "stopped"
    act = at_step(9, lambda: os.kill(os.getpid(), signal.SIGTERM))
    found["stopped"] = kill_runs.statuses(kill_runs.start(stopped, False, 2, act))
    kept = checkpoint.Checkpoints(stopped / "checkpoints")
    found["kept"] = kept.check()[0]
    module = models.make("mlp", 10, (1, 8, 8), kill_runs.SETTINGS["width"])
    module.load_state_dict(checkpoint.read_member(kept.folder, 1))  # a plain module
    for ranks in (1, 2, 3):
        copy = folder / f"copy{ranks}"
        shutil.copytree(stopped, copy)
        assert kill_runs.finished(kill_runs.start(copy, True, ranks))
        found[f"off as {ranks}"] = off(copy, folder / "whole1")
    same = ((folder / one / "checkpoint.safetensors").read_bytes() for one in ("copy2", "whole2"))
    found["same bytes"] = next(same) == next(same)
    full = folder / "full"
    found["full"] = kill_runs.statuses(kill_runs.start(full, False, 2, at_step(10, full_disk)))
    found["kept before"] = checkpoint.Checkpoints(full / "checkpoints").check()[0]
    assert kill_runs.finished(kill_runs.start(full, True, 2))
    found["off after"] = off(full, folder / "whole2")
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in kill_runs.SETTINGS.items()]
    done = under_torchrun("train", *flags, "--checkpoint-every=3", f"--out={folder / 'restarted'}", restarts=1)
    assert done.returncode == 0, done.stdout + done.stderr
    found["went on after"] = [int(step) for step in re.findall(r"going on after step (\d+)", done.stderr)]
    found["off after the restart"] = off(folder / "restarted", folder / "whole2")
    done = under_torchrun("compare", *flags, "--json", "--methods=forde-pca,de", f"--out={folder / 'both'}")
    assert done.returncode == 0, done.stdout + done.stderr
    found["off beside another"] = off(folder / "both" / "forde-pca", folder / "whole2")
    found["refused"] = under_torchrun("info").stderr
    print(json.dumps(found))


if __name__ == "__main__":
    if "TORCHELASTIC_RUN_ID" in os.environ:
        worker(*sys.argv[1:])
    else:
        main(Path(sys.argv[1]))
