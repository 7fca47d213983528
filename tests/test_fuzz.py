"""Files of any content: every reader gives what it read or one line that says what is wrong, and runs nothing.

`python tests/test_fuzz.py MINUTES [READER]` goes on for so long with each, or one, and prints what it could not bear.
"""

import gzip
import io
import json
import pickle
import struct
import sys
import tarfile
import tempfile
import time
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from torch import nn

import forde_fast as ff
from forde_fast import checkpoint, config
from forde_fast.data import cifar, own
from forde_fast.data.datasets import read_idx
from forde_fast.lengthscales.base import Lengthscale

FOLDER = Path(tempfile.mkdtemp(prefix="forde_fast_fuzz"))
ENSEMBLE = ff.Ensemble(lambda: nn.Linear(2, 2), 2)


def stored(content: bytes, name: str) -> Path:
    path = FOLDER / name
    path.write_bytes(content)
    return path


def npy(array) -> bytes:
    out = io.BytesIO()
    np.save(out, array)
    return out.getvalue()


def npz(**arrays) -> bytes:
    out = io.BytesIO()
    np.savez(out, **arrays)
    return out.getvalue()


def tar(files: dict[str, bytes]) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w:gz") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return out.getvalue()


def saved(save) -> bytes:
    path = FOLDER / "valid.safetensors"
    save(path)
    return path.read_bytes()


def pickled() -> bytes:
    return pickle.dumps({"data": np.zeros((2, 3072), np.uint8), "labels": [0, 1], "name": b"x"}, protocol=2)


IDX = struct.pack(">4B2I", 0, 0, 8, 2, 3, 5) + bytes(15)
STATE = {"steps": 3, "members": [0], "ensemble": {"members.0.weight": torch.ones(2, 2)}, "velocity": torch.ones(1, 4)}

# name -> the reader of bytes, and a file that it takes
READERS = {
    "toml": (lambda b: config.TrainConfig(**config.read(stored(b, "a.toml"))), b'lr = 0.5\nseed = 3\n'),
    "idx": (lambda b: read_idx(stored(b, "a-idx"), 2), IDX),
    "idx.gz": (lambda b: read_idx(stored(b, "a-idx"), 2), gzip.compress(IDX, mtime=0)),
    "npy": (lambda b: cifar.load_npy(stored(b, "a.npy")).sum(), npy(np.arange(6.0))),
    "npz": (lambda b: own.load_arrays(stored(b, "a.npz"), True), npz(x=np.ones((4, 2)), y=np.array([0, 0, 1, 1]))),
    "pickle": (lambda b: cifar.unpickle("a", b), pickled()),
    "tar": (lambda b: cifar.read_tar(stored(b, "a.tar.gz")), tar({"a/b": b"text", "a/c": bytes(700)})),
    "csv": (lambda b: own.load_csv(stored(b, "a.csv")), b"a,b,label\n1,2,0\n2,3,0\n1,1,1\n0,1,1\n"),
    "state": (checkpoint.unpack, checkpoint.pack(STATE)),
    "ensemble": (
        lambda b: ff.load_ensemble(stored(b, "a.safetensors"), ENSEMBLE),
        saved(lambda path: ff.save_ensemble(path, ENSEMBLE)),
    ),
    "lengthscale": (
        lambda b: Lengthscale.load(stored(b, "b.safetensors")),
        saved(ff.PCA(torch.eye(3), torch.ones(3)).save),
    ),
}  # fmt: skip


EXTREME = [
    b"\0" * 4,
    b"\xff" * 4,
    b"\xff" * 8,
    b"\x7f" + b"\xff" * 7,
    b"-1",
    b"9" * 30,
    b"[" * 3000,
    b"{" * 3000,
    b"../x",
]


@st.composite
def damaged(draw, content: bytes) -> bytes:
    """Some bytes replaced, left out or put in between; or anything at all."""
    if draw(st.integers(0, 9)) == 0:
        return draw(st.binary(max_size=200))
    for _ in range(draw(st.integers(1, 4))):
        start = draw(st.integers(0, len(content)))
        stop = min(len(content), start + draw(st.integers(0, 12)))
        if draw(st.integers(0, 5)) == 0:
            stop = len(content)
        middle = draw(st.binary(max_size=12) | st.just(content[stop : stop + 40]) | st.sampled_from(EXTREME))
        content = content[:start] + middle + content[stop:]
    return content


def bears(read, content: bytes) -> None:
    before, text = set(Path.cwd().iterdir()), "read"
    try:
        read(content)
    except (ValueError, TypeError, OSError) as error:
        text = str(error)
    assert text.isprintable(), repr(text)
    assert 0 < len(text) < 1000, repr(text)
    assert set(Path.cwd().iterdir()) <= before, "a file was written"


@pytest.mark.parametrize("name", READERS)
def test_whole_files_are_read(name):
    read, content = READERS[name]
    read(content)


def fuzz(name: str, **options) -> None:
    read, content = READERS[name]

    @given(damaged(content))
    @settings(deadline=None, database=None, suppress_health_check=list(HealthCheck), **options)
    def borne(found):
        bears(read, found)

    borne()


@pytest.mark.parametrize("name", READERS)
def test_damaged_files_are_borne(name):
    fuzz(name, max_examples=60, derandomize=True)


FOUND = [
    ("npy", b"\x93NUMPY\x01\x00v\x00" + b"[" * 300),  # NumPy's own parser stumbled
    ("pickle", b"\x80\x02cnumpy._core.multiarray\n\x02}q\x00\n."),  # the message quoted it as it is
    ("toml", b"lr = " + b"[" * 3000),
    ("toml", b"seed = " + b"9" * 5000),
    ("toml", b"[" * 3000),
    ("csv", b"a,b,label\n" + b"[" * 3000 + b",2,0\n1,2,0\n"),  # quoted in full
    ("csv", b"a,b,label\n1,2,999999999\n1,2,0\n"),  # as many classes were made
    ("npz", npz(x=np.ones((2, 2)), y=np.array([0, 1 << 40]))),
    ("state", b"\xff" * 7 + b"\x7f" + b"{}"),
    ("state", checkpoint.pack({"steps": 1}).replace(b"steps", b"\\u000a")),
]


@pytest.mark.parametrize(("name", "content"), FOUND)
def test_what_was_found_stays_borne(name, content):
    bears(READERS[name][0], content)


def test_a_small_file_that_unpacks_to_a_large_one_is_not_unpacked():
    path = stored(gzip.compress(IDX + bytes(50 << 20)), "bomb-idx")
    tracemalloc.start()
    with pytest.raises(ValueError, match=r"bomb-idx: expected 27 bytes for shape \[3, 5\], got more$"):
        read_idx(path, 2)
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert most < 2 << 20


class Evil:
    def __reduce__(self):
        return Path.write_text, (FOLDER / "ran", "code")


def test_checkpoints_that_are_pickles_are_refused_and_not_run():
    torch.save({"weight": Evil()}, FOLDER / "evil.safetensors")
    with pytest.raises(ValueError, match=r"^path: expected a checkpoint in safetensors, got "):
        ff.load_ensemble(FOLDER / "evil.safetensors", ENSEMBLE)
    content = (FOLDER / "evil.safetensors").read_bytes()
    with pytest.raises(ValueError, match=r"^state: expected what a training keeps, in safetensors"):
        checkpoint.unpack(content)
    assert not (FOLDER / "ran").exists()


def main(minutes: float, *names: str) -> int:
    """Each reader for so many minutes."""
    failed = 0
    for name in names or READERS:
        end, tried = time.monotonic() + 60 * minutes, 0
        while time.monotonic() < end:
            try:
                fuzz(name, max_examples=200, phases=[Phase.generate, Phase.shrink])
            except BaseException as error:
                notes = " ".join(getattr(error, "__notes__", []))
                print(f"{name}: {type(error).__name__}: {error}\n{notes}", flush=True)
                failed += 1
                break
            tried += 200
        print(json.dumps({"reader": name, "files": tried, "minutes": minutes}), flush=True)
    return failed


if __name__ == "__main__":
    sys.exit(main(float(sys.argv[1]), *sys.argv[2:]))
