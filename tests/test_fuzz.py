"""Files of any content: every reader gives what it read or one line that says what is wrong, and runs nothing.

`python tests/test_fuzz.py MINUTES [READER ...]` goes on for so long with each, by the processor's clock, and prints
what it could not bear.
"""

import atexit
import gzip
import io
import json
import pickle
import shutil
import struct
import sys
import tarfile
import tempfile
import time
import tracemalloc
import warnings
import zipfile
from pathlib import Path
from random import Random

import numpy as np
import pytest
import safetensors.torch
import scipy.io
import torch
from hypothesis import given, note, settings
from hypothesis import strategies as st
from PIL import Image
from torch import nn

import forde_fast as ff
from forde_fast import checkpoint, config, doctor
from forde_fast.data import cifar, own, published
from forde_fast.data.corrupted import open_corrupted
from forde_fast.data.datasets import read_idx
from forde_fast.lengthscales.base import Lengthscale

FOLDER = Path(tempfile.mkdtemp(prefix="forde_fast_fuzz"))
atexit.register(shutil.rmtree, FOLDER, ignore_errors=True)
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


def zipped(**files: bytes) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        for name, content in files.items():
            archive.writestr(f"{name}.npy", content)
    return out.getvalue()


def tar(files: dict[str, bytes], mode: str = "w:gz") -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode=mode) as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return out.getvalue()


def saved(save) -> bytes:
    path = FOLDER / "valid.safetensors"
    save(path)
    return path.read_bytes()


def mat() -> bytes:
    out = io.BytesIO()
    scipy.io.savemat(out, {"X": np.zeros((32, 32, 3, 2), np.uint8), "y": np.array([[1], [10]], np.uint8)})
    return out.getvalue()


def image(form: str, mode: str = "RGB", turn: int | None = None) -> bytes:
    out, exif = io.BytesIO(), Image.Exif()
    exif[0x0112] = turn
    pixels = Image.fromarray(np.arange(48, dtype=np.uint8).reshape(4, 4, 3)).convert(mode)
    pixels.save(out, form, exif=exif if turn else b"")
    return out.getvalue()


def cifar100(part: bytes):
    """What an archive in which one file is `part` is read as."""
    names = pickle.dumps({"fine_label_names": ["a", "b"]})
    files = {"cifar-100-python/train": part, "cifar-100-python/test": PICKLE, "cifar-100-python/meta": names}
    content = tar(files, "w:")
    return cifar.load_cifar("cifar100", stored(content, "c.tar"), False)


def corrupted(content: bytes, name: str) -> None:
    """Read all of a folder of the layout of CIFAR-10-C, in which one file is `content`, or of the archive itself."""
    place = FOLDER / "C"
    place.mkdir(exist_ok=True)
    for file, good in (("fog.npy", FOG), ("labels.npy", C_LABELS)):
        (place / file).write_bytes(content if file == name else good)
    list(open_corrupted(stored(content, "C.tar") if name == "tar" else place, (2, 2), ["a", "b"]))


def tiny(wnids: bytes) -> None:
    (FOLDER / "train" / "n01" / "images").mkdir(parents=True, exist_ok=True)
    (FOLDER / "train" / "n01" / "images" / "a.JPEG").write_bytes(b"")
    stored(b"n01\tcat\n", "words.txt")
    published.load_tiny_imagenet(stored(wnids, "wnids.txt").parent)


def resumed(text: bytes) -> None:
    """Load a checkpoint with another text beside its tensors, and the right checksum in its name, into a trainer."""
    content = safetensors.torch.save(
        safetensors.torch.load(STATE), {"forde_fast.state": text.decode(errors="replace")}
    )
    kept = checkpoint.Checkpoints(FOLDER / "checkpoints")
    kept.folder.mkdir(exist_ok=True)
    for path in kept.folder.iterdir():
        path.unlink()
    stored(content, f"checkpoints/00000003-0of1-{checkpoint._checksum(content)}.safetensors")
    step, _ = kept.check()
    ff.Trainer(ENSEMBLE, "de").load_state_dict(kept.read(step))


PICKLE = pickle.dumps({"data": np.zeros((2, 3072), np.uint8), "fine_labels": [0, 1], "name": b"x"}, protocol=2)
IDX = struct.pack(">4B2I", 0, 0, 8, 2, 3, 5) + bytes(15)
STATE = checkpoint.pack(checkpoint.piece(ff.Trainer(ENSEMBLE, "de").state_dict(), range(2)))
TEXT = json.loads(STATE[8 : 8 + int.from_bytes(STATE[:8], "little")])["__metadata__"]["forde_fast.state"].encode()
FOG, C_LABELS = npy(np.zeros((10, 2, 2), np.uint8)), npy(np.tile([0, 1], 5))
LOG = b'{"step": 1, "epoch": 0, "rows": 20, "cross_entropy": 2.5}\n{"step": 2, "cross_entropy": 2.1}\n'

# name -> the reader of bytes, and a file that it takes
READERS = {
    "toml": (lambda b: config.TrainConfig(**config.read(stored(b, "a.toml"))), b'lr = 0.5\nseed = 3\n'),
    "idx": (lambda b: read_idx(stored(b, "a-idx"), 2), IDX),
    "idx.gz": (lambda b: read_idx(stored(b, "a-idx"), 2), gzip.compress(IDX, mtime=0)),
    "npy": (lambda b: cifar.load_npy(stored(b, "a.npy")).sum(), npy(np.arange(6.0))),
    "npz": (lambda b: own.load_arrays(stored(b, "a.npz"), True), npz(x=np.ones((4, 2)), y=np.array([0, 0, 1, 1]))),
    "npy in npz": (
        lambda b: own.load_arrays(stored(zipped(x=b, y=npy(np.array([0, 0, 1, 1]))), "a.npz"), True),
        npy(np.ones((4, 2))),
    ),
    "pickle": (lambda b: cifar.unpickle("a", b), PICKLE),
    "cifar": (cifar100, PICKLE),
    "tar": (lambda b: cifar.read_tar(stored(b, "a.tar.gz")), tar({"a/b": b"text", "a/c": bytes(700)})),
    "tar.open": (lambda b: cifar.read_tar(stored(b, "a.tar")), tar({"a/b": b"text", "a/c": bytes(9)}, "w:")),
    "mat": (lambda b: published.read_svhn(stored(b, "a.mat")), mat()),
    "corrupted": (lambda b: corrupted(b, "fog.npy"), FOG),
    "corrupted labels": (lambda b: corrupted(b, "labels.npy"), C_LABELS),
    "corrupted.tar": (lambda b: corrupted(b, "tar"), tar({"C/fog.npy": FOG, "C/labels.npy": C_LABELS}, "w:")),
    "png": (lambda b: own.read_image(stored(b, "a.png"), None), image("PNG")),
    "jpeg": (lambda b: own.read_image(stored(b, "a.jpeg"), (4, 4)), image("JPEG")),
    "png on white": (lambda b: own.read_image(stored(b, "a.png"), None), image("PNG", "RGBA", 6)),
    "jpeg turned": (lambda b: own.read_image(stored(b, "a.jpeg"), (4, 4)), image("JPEG", turn=6)),
    "wnids": (tiny, b"n01\nn02\n"),
    "csv": (lambda b: own.load_csv(stored(b, "a.csv")), b"a,b,label\n1,2,0\n2,3,0\n1,1,1\n0,1,1\n"),
    "log": (lambda b: doctor.examine(doctor.read_log(stored(b, "log.jsonl").parent)), LOG),
    "state": (checkpoint.unpack, STATE),
    "checkpoint": (resumed, TEXT),
    "ensemble": (
        lambda b: ff.load_ensemble(stored(b, "a.safetensors"), ENSEMBLE),
        saved(lambda path: ff.save_ensemble(path, ENSEMBLE)),
    ),
    "lengthscale": (
        lambda b: Lengthscale.load(stored(b, "b.safetensors")),
        saved(ff.PCA(torch.eye(3), torch.ones(3)).save),
    ),
}  # fmt: skip
REFUSED = ("wnids",)  # the one whole file of theirs is not enough of a set


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


def damaged(random: Random, content: bytes) -> bytes:
    """Some bytes replaced (where lengths are told, by as many), left out or put in between; or anything at all."""
    if random.random() < 0.1:
        return random.randbytes(random.randrange(200))
    for _ in range(random.randint(1, 4)):
        start = random.randint(0, len(content))
        stop = len(content) if random.random() < 0.15 else min(len(content), start + random.randrange(13))
        kinds = random.randbytes(random.randrange(13)), content[stop : stop + 40], random.choice(EXTREME)
        middle = random.choice(kinds)
        if random.random() < 0.5:
            middle = middle[: stop - start].ljust(stop - start)
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


@pytest.mark.parametrize("name", [name for name in READERS if name not in REFUSED])
def test_whole_files_are_read(name):
    read, content = READERS[name]
    read(content)


@pytest.mark.parametrize("name", READERS)
def test_damaged_files_are_borne(name):
    read, content = READERS[name]

    @given(st.randoms(use_true_random=True))
    @settings(max_examples=150, derandomize=True, deadline=None, database=None)
    def borne(random):
        found = damaged(random, content)
        note(repr(found))
        bears(read, found)

    borne()


FOUND = [
    ("npy", b"\x93NUMPY\x01\x00v\x00" + b"[" * 300),  # NumPy's own parser stumbled
    ("pickle", b"\x80\x02cnumpy._core.multiarray\n\x02}q\x00\n."),  # the message quoted it as it is
    ("cifar", PICKLE.replace(b"|q\x11NN", b"N")),  # NumPy's type took the state of another version, and crashed
    ("pickle", b"\x80\x02c_codecs\nencode\n}X\x04\x00\x00\x00nameK\x01sb."),  # gave a function an attribute
    ("cifar", b"\x80\x02}X\x04\x00\x00\x00datacnumpy\nndarray\n)\x81s."),  # an array that is never said more of
    ("pickle", b"\x80\x02}r\xff\xff\xff\x7f."),  # a memo of 2^31 places
    ("toml", b"lr = " + b"[" * 3000),
    ("toml", b"seed = " + b"9" * 5000),
    ("toml", b"[" * 3000),
    ("csv", b"a,b,label\n" + b"[" * 3000 + b",2,0\n1,2,0\n"),  # quoted in full
    ("csv", b"a,b,label\n1,2,999999999\n1,2,0\n"),  # as many classes were made
    ("npz", npz(x=np.ones((2, 2)), y=np.array([0, 1 << 40]))),
    ("csv", b"a,b,label\n1,1e39,0\n2,3,0\n1,1,1\n0,1,1\n"),  # too large for float32
    ("npz", npz(x=np.full((4, 2), 1e39), y=np.array([0, 0, 1, 1]))),
    ("npy in npz", b""),  # NumPy gives what is no array as bytes
    ("wnids", b"\x00n01\nn02\n"),
    ("lengthscale", READERS["lengthscale"][1].replace(b"eigenvectors", b"eige\x7fvectors")),
    ("log", b"[" * 3000),
    ("log", LOG.replace(b"2.5", b'"2.5"')),
    ("checkpoint", TEXT.replace(b"velocity", b"velocities", 1)),
    ("checkpoint", TEXT.replace(b"members.0.w", b"members.0.w" + b"[" * 3000, 1)),  # quoted in full
    ("checkpoint", TEXT.replace(b"members.0.w", b"members.0.\xd7\x8e", 1)),  # cannot be shown
    ("checkpoint", TEXT.replace(b"optimizer", b"optimizers", 1)),
    ("checkpoint", TEXT.replace(b'"steps": 0', b'"steps": "0"')),
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
    warnings.simplefilter("ignore")  # NumPy's, of headers that Python 2 might have written
    failed = 0
    for name in names or READERS:
        (read, content), random = READERS[name], Random()
        end, tried = time.process_time() + 60 * minutes, 0
        while time.process_time() < end:
            found, tried = damaged(random, content), tried + 1
            try:
                bears(read, found)
            except BaseException as error:
                print(f"{name}: {type(error).__name__}: {str(error)[:500]}\n{found}", flush=True)
                failed += 1
                break
        print(json.dumps({"reader": name, "files": tried, "minutes": minutes}), flush=True)
    return failed


if __name__ == "__main__":
    sys.exit(main(float(sys.argv[1]), *sys.argv[2:]))
