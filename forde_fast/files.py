"""Writing files so that nothing already on disk is lost."""

import os
from pathlib import Path


def write(path: str | Path, content: bytes) -> None:
    """Write beside, then rename: a full disk or a kill leaves what was there."""
    part = Path(f"{path}.part")
    try:
        part.write_bytes(content)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
