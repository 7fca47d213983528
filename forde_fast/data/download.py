"""Files from public addresses, by checksum, into a cache that can be pointed elsewhere."""

from __future__ import annotations

import hashlib
import http.client
import os
import ssl
import sys
import urllib.error
import urllib.request
from pathlib import Path

from forde_fast.validation import reason_of

# What goes wrong between here and an address, unlike a full disk.
UNREACHED = (urllib.error.URLError, http.client.HTTPException, ssl.SSLError, ConnectionError, TimeoutError)


def cache() -> Path:
    """$FORDE_FAST_CACHE, ~/.cache/forde_fast if unset."""
    return Path(os.environ.get("FORDE_FAST_CACHE") or Path.home() / ".cache" / "forde_fast")


def advice(name: str, files: str) -> str:
    """What to do about a set that is not there. Many commands read one, and few have a flag that fetches it."""
    fetch = f"fetch it by forde_fast.data.load({name!r}, download=True) or by --download where a command has it"
    return f"name a folder that holds {files} (--data-dir, --ood-dir), or {fetch}"


def download(name: str, url: str, md5: str, path: Path) -> Path:
    """Fetch a file of the set `name` from url to path, with progress on a terminal. The file gets its name once its
    checksum is right; else nothing is left behind. Raises ValueError for another checksum, OSError where it cannot be
    fetched or written."""
    path.parent.mkdir(parents=True, exist_ok=True)
    digest = hashlib.md5(usedforsecurity=False)
    partial = path.with_name(f"{path.name}.{os.getpid()}")
    try:
        with partial.open("wb") as file, urllib.request.urlopen(url, timeout=60) as answer:
            size = int(answer.headers.get("Content-Length") or 0)
            with _progress(path.name, size) as advance:
                while block := answer.read(1 << 20):
                    digest.update(block)
                    file.write(block)
                    advance(len(block))
        if digest.hexdigest() != md5:
            raise ValueError(f"{url}: expected a file with md5 {md5}, got {digest.hexdigest()}")
        os.replace(partial, path)
    except UNREACHED as error:
        reason = reason_of(error.reason if type(error) is urllib.error.URLError else error)
        got = f"{reason}; --data-dir takes a folder with the file, fetched by hand"
        raise OSError(f"{name}: expected a file from {url}, got {got}") from None
    finally:
        partial.unlink(missing_ok=True)
    return path


class _progress:
    """A bar on stderr where that is a terminal: `with _progress(name, bytes) as advance: advance(1000)`."""

    def __init__(self, name: str, size: int):
        from rich.console import Console
        from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
        self.bar = Progress(*columns, console=Console(stderr=True), disable=not sys.stderr.isatty())
        self.task = self.bar.add_task(name, total=size or None)

    def __enter__(self):
        self.bar.start()
        return lambda count: self.bar.update(self.task, advance=count)

    def __exit__(self, *exception) -> None:
        self.bar.stop()
