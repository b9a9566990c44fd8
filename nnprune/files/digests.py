"""SHA-256 of files, all bytes of them, read once: what was hashed is remembered by path, size and times.

Known digests lie in digests.json in the user's cache folder. A cache that is damaged, missing or can't be written costs time only.
"""

import hashlib
import json
import os
import time
from contextlib import suppress
from pathlib import Path

from nnprune.records import write_atomically

SETTLED = 2 * 10**9
"""Nanoseconds after which a file's time tells a later change: file systems count in steps of up to two seconds."""

MOST = 10_000
"""Files that are remembered."""

_known: dict[str, str] = {}


def file_digest(path: Path) -> str:
    """SHA-256 over all bytes of a file, in hexadecimal. Raises OSError when it can't be read."""
    place = path.resolve()
    stamp = _stamp(place)
    if stamp not in _known:
        _known.update(_read())
    if stamp in _known:
        return _known[stamp]
    with place.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    changed = max(place.stat().st_mtime_ns, place.stat().st_ctime_ns)
    if _stamp(place) == stamp and time.time_ns() - changed > SETTLED:
        _known[stamp] = digest
        _write({stamp: digest})
    return digest


def _stamp(path: Path) -> str:
    """What changes when a file does. The time of its inode also tells of a copy that kept the time of its contents."""
    stat = path.stat()
    return json.dumps([str(path), stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns])


def cache_folder() -> Path:
    """nnprune's folder in the user's cache. Raises RuntimeError when nobody has a home."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "nnprune"


def _cache() -> Path:
    return cache_folder() / "digests.json"


def _read() -> dict[str, str]:
    """What earlier processes hashed; nothing where the cache is missing or damaged."""
    with suppress(OSError, ValueError, RuntimeError, RecursionError):
        found = json.loads(_cache().read_text(encoding="utf-8"))
        if isinstance(found, dict):
            return {stamp: digest for stamp, digest in found.items() if isinstance(digest, str) and len(digest) == 64}
    return {}


def _write(new: dict[str, str]) -> None:
    """Add to the cache, if it can be written."""
    with suppress(OSError, ValueError, RuntimeError):
        known = list((_read() | new).items())[-MOST:]
        write_atomically(_cache(), json.dumps(dict(known), indent=0) + "\n")
