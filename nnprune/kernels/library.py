"""Compiles the C kernels with the machine's own compiler at first use, caches the shared library and loads it.

The cache is `$XDG_CACHE_HOME/nnprune`, or `~/.cache/nnprune`. A cached library runs inside this process, so it is loaded only if
nobody else could have written it and if it is complete: folder and file belong to this user, neither is writable for others, and
the file's name carries the SHA-256 of its bytes. (Mapping a truncated library ends the process with SIGBUS, not with an error.)
Otherwise the kernels are compiled again.
"""

import contextlib
import ctypes
import hashlib
import logging
import os
import platform
import shlex
import stat
import subprocess
import tempfile
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from torch import Tensor

log = logging.getLogger(__name__)

FLAGS = ("-O3", "-march=native", "-fopenmp", "-shared", "-fPIC", "-std=gnu11")

COMPILE_TIMEOUT = 300
"""Seconds."""

_is_enabled = True


def enable(wanted: bool) -> None:
    """Switch the kernels on or off for the whole process."""
    global _is_enabled
    _is_enabled = wanted


def library() -> ctypes.CDLL | None:
    """The loaded kernels; None if they are switched off or cannot be compiled here, which is logged once."""
    return _load() if _is_enabled else None


@cache
def _load() -> ctypes.CDLL | None:
    compiler = shlex.split(os.environ.get("CC", "cc"))
    sources = sorted(Path(__file__).parent.glob("*.[ch]"))
    parts = [*(source.read_bytes() for source in sources), " ".join((*compiler, *FLAGS)).encode(), _processor().encode()]
    key = hashlib.sha256(b"|".join(parts)).hexdigest()[:16]
    command = [*compiler, *FLAGS, *(str(source) for source in sources if source.suffix == ".c")]
    try:
        with _safe_folder() as folder:
            return _load_cached(folder, key) or _compile(command, folder, key)
    except (OSError, RuntimeError, subprocess.SubprocessError) as error:  # RuntimeError: the user has no home
        reason = (getattr(error, "stderr", None) or str(error)).strip().split("\n")[0]
        log.info("C kernels: not compiled, using PyTorch instead, which is slower (%s)", reason)
        return None


@contextlib.contextmanager
def _safe_folder() -> Iterator[Path]:
    """The cache folder, or a temporary one where the cache belongs to another user."""
    folder = cache_folder()
    folder.parent.mkdir(parents=True, exist_ok=True)
    with contextlib.suppress(FileExistsError):
        folder.mkdir(mode=0o700)
    if os.stat(folder).st_uid != os.getuid():
        log.warning("warning: C kernels: %s belongs to another user; compiled for this process alone", folder)
        with tempfile.TemporaryDirectory(prefix="nnprune-") as private:
            yield Path(private)
        return
    if os.stat(folder).st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        log.warning("warning: C kernels: %s was writable for others; made private and compiled again", folder)
        os.chmod(folder, 0o700)
        for path in folder.glob("kernels-*.so"):  # anyone may have put it there
            path.unlink(missing_ok=True)
    yield folder


def _load_cached(folder: Path, key: str) -> ctypes.CDLL | None:
    """The library cached for this key; None if there is none that can be trusted."""
    for path in sorted(folder.glob(f"kernels-{key}-*.so")):
        problem = _problem(path)
        if problem is None:
            with contextlib.suppress(OSError):  # another process has just removed it
                return ctypes.CDLL(str(path))
            problem = "cannot be loaded"
        log.warning("warning: C kernels: %s %s; compiled again", path, problem)
        path.unlink(missing_ok=True)
    return None


def _problem(path: Path) -> str | None:
    """Why a cached library must not be loaded; None if it may be."""
    try:
        status = os.lstat(path)
        if not stat.S_ISREG(status.st_mode):
            return "is not a regular file"
        if status.st_uid != os.getuid():
            return "belongs to another user"
        if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
            return "is writable for others"
        return None if path.stem.endswith(f"-{_sha256(path)}") else "is damaged"
    except OSError as error:
        return f"cannot be read ({error.strerror})"


def _compile(command: list[str], folder: Path, key: str) -> ctypes.CDLL:
    """Compile, load and cache the kernels.

    The file reaches its final name complete or not at all: other processes may compile the same, and the machine may crash. It is
    loaded before that, so that no other process can take it away.
    """
    handle, name = tempfile.mkstemp(dir=folder, suffix=".so")
    unfinished = Path(name)
    try:
        os.close(handle)
        command = [*command, "-o", name, "-lm"]
        subprocess.run(command, check=True, capture_output=True, text=True, timeout=COMPILE_TIMEOUT)
        unfinished.chmod(0o700)  # the linker has replaced the file of mkstemp
        _flush(unfinished)
        digest, loaded = _sha256(unfinished), ctypes.CDLL(name)
        unfinished.replace(folder / f"kernels-{key}-{digest}.so")
        _flush(folder)
        return loaded
    finally:
        unfinished.unlink(missing_ok=True)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _flush(path: Path) -> None:
    """Write a file or a folder's entries to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def cache_folder() -> Path:
    """Where compiled kernels are kept. Raises RuntimeError for a user without a home."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "nnprune"


def _processor() -> str:
    """What `-march=native` depends on: machines of different kinds may share a home."""
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return "|".join(sorted({line for line in lines if line.startswith(("model name", "flags", "Features", "CPU part"))}))
    return f"{platform.machine()} {platform.processor()}"


def address(tensor: Tensor) -> ctypes.c_void_p:
    """Address of a tensor's first element, as an argument of a kernel."""
    return ctypes.c_void_p(tensor.data_ptr())
