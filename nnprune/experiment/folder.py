"""The folder of a run: named, locked against other processes, and logged into."""

import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from nnprune.engine import parallel

log = logging.getLogger(__name__)


def run_folder(outputs: str, model: str, pattern: str, label: str, name: str) -> Path:
    """outputs/<model>/<pattern>/<label>-<name>, with characters that every file system accepts."""
    parts = [re.sub(r"^\.|[^\w.+-]", "_", part) for part in (model, pattern.replace(":", "of"), f"{label}-{name}")]
    return Path(str(outputs)).joinpath(*parts)


@contextmanager
def locked(folder: Path, wait: bool = True) -> Iterator[bool]:
    """Create a folder and hold its lock. Yields False, at once, if another process holds it and we do not `wait`.

    Raises OSError naming the folder when it cannot be written.
    """
    locks: list[FileLock] = []
    try:
        yield _acquire(folder, wait, locks)
    finally:
        for lock in locks:
            lock.release()


@contextmanager
def logged(folder: Path) -> Iterator[None]:
    """Log into a folder's run.log. Raises OSError naming the folder when it cannot be written."""
    with _explained(folder):
        handler = logging.NullHandler() if parallel.rank() else logging.FileHandler(folder / "run.log")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    logger = logging.getLogger("nnprune")
    if logger.level == logging.NOTSET:  # called from Python, without Hydra's logging
        logger.setLevel(logging.INFO)
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        handler.close()


@contextmanager
def _explained(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        reason = f"outputs={folder}: cannot be written ({error.strerror})"
        raise OSError(error.errno, f"{reason}; set outputs=DIR to a writable folder") from error


@parallel.on_rank_0
def _acquire(folder: Path, wait: bool, locks: list[FileLock]) -> bool:
    """Add the lock of a folder, which the system releases when a process dies, to `locks`. Returns False if another process holds
    it and we do not `wait`."""
    with _explained(folder):
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / ".lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            if not wait:
                return False
            log.info("waiting for another process to release %s", folder)
            lock.acquire()
        except NotImplementedError:
            log.warning("warning: %s is on a file system without locks: do not start the same run twice at once", folder)
    locks.append(lock)
    return True
