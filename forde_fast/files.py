"""Writing files so that nothing already on disk is lost."""

import os
from pathlib import Path

from forde_fast.validation import expect


def write(path: str | Path, content: bytes) -> None:
    """Write beside, then rename: a full disk, a kill or a power cut leaves what was there, or all of the new."""
    part = Path(f"{path}.part")
    try:
        with open(part, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
        _sync_folder(part.parent)
    finally:
        part.unlink(missing_ok=True)


def make_folder(path: str | Path, name: str = "out") -> Path:
    """The folder, made where it is not there, in which files can be written: else FileExistsError or OSError in one
    line that has the argument's `name`."""
    folder = Path(path)
    expect(not folder.is_file(), name, "a folder", f"the file {folder}", FileExistsError)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        reason = "" if os.access(folder, os.W_OK) else "it is read-only"
    except OSError as error:
        reason = error.strerror
    expect(not reason, name, "a folder that can be written", f"{folder} ({reason})", OSError)
    return folder


def _sync_folder(folder: Path) -> None:
    """The rename itself reaches the disk; systems that cannot open a folder do without."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
