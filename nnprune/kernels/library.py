"""Compiles the kernels with the machine's own C compiler, the first time they are asked for, and loads them."""

import contextlib
import ctypes
import hashlib
import logging
import os
import platform
import shlex
import subprocess
import tempfile
from functools import cache
from pathlib import Path

from torch import Tensor

log = logging.getLogger(__name__)

FLAGS = ("-O3", "-march=native", "-fopenmp", "-shared", "-fPIC", "-std=gnu11")

_is_enabled = True


def enable(wanted: bool) -> None:
    """Whether `library` may give what it has. Of the process, like PyTorch's number of threads."""
    global _is_enabled
    _is_enabled = wanted


def library() -> ctypes.CDLL | None:
    """The kernels; None where they are not wanted or this machine can't compile them, which is said once."""
    return _load() if _is_enabled else None


@cache
def _load() -> ctypes.CDLL | None:
    compiler = shlex.split(os.environ.get("CC", "cc"))
    sources = sorted(Path(__file__).parent.glob("*.[ch]"))
    parts = [*(source.read_bytes() for source in sources), " ".join((*compiler, *FLAGS)).encode(), _processor().encode()]
    target = _folder() / f"kernels-{hashlib.sha256(b'|'.join(parts)).hexdigest()[:16]}.so"
    try:
        if not target.exists():
            _compile([*compiler, *FLAGS, *(str(source) for source in sources if source.suffix == ".c")], target)
        return ctypes.CDLL(str(target))
    except (OSError, RuntimeError, subprocess.SubprocessError) as error:  # RuntimeError: nobody has a home
        reason = getattr(error, "stderr", None) or str(error)
        log.info("kernels in C: not compiled, PyTorch serves instead, more slowly (%s)", reason.strip().split("\n")[0])
        return None


def _compile(command: list[str], target: Path) -> None:
    """Write `target` at once or not at all: other processes may be at it too."""
    target.parent.mkdir(parents=True, exist_ok=True)
    handle, unfinished = tempfile.mkstemp(dir=target.parent, suffix=".so")
    os.close(handle)
    try:
        subprocess.run([*command, "-o", unfinished, "-lm"], check=True, capture_output=True, text=True, timeout=300)
        os.chmod(unfinished, 0o755)
        os.replace(unfinished, target)
    finally:
        with contextlib.suppress(OSError):
            os.unlink(unfinished)


def _folder() -> Path:
    """Where compiled kernels stay: the user's cache. Never a folder that others may write to."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "nnprune"


def _processor() -> str:
    """What `-march=native` depends on: homes are shared between unlike machines."""
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return "|".join(sorted({line for line in lines if line.startswith(("model name", "flags", "Features", "CPU part"))}))
    return f"{platform.machine()} {platform.processor()}"


def address(tensor: Tensor) -> ctypes.c_void_p:
    """The address of a tensor's first number, to be passed to a kernel."""
    return ctypes.c_void_p(tensor.data_ptr())
