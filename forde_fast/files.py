"""Writing files so that nothing already on disk is lost."""

import os
from pathlib import Path


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
