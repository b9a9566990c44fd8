"""Where a figure came from: versions of packages, and the commit of this one."""

import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from nnprune.native.library import library

PACKAGES = ("nnprune", "torch", "transformers", "datasets", "hydra-core", "safetensors")
REPOSITORY = Path(__file__).parent.parent


def versions() -> dict[str, str]:
    """Package -> version, and Python's; `kernels` tells whether those in C could be used."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:  # a checkout that was never installed
            found[package] = "not installed"
    found["kernels"] = "PyTorch" if library() is None else "C"
    return found


def commit() -> tuple[str | None, bool | None]:
    """The commit of this checkout and whether tracked files but records differ from it; (None, None) outside a checkout."""
    if not (REPOSITORY / ".git").exists():
        return None, None
    try:
        head = _git("rev-parse", "HEAD")
        return head, bool(_git("status", "--porcelain", "--untracked-files=no", "--", ".", ":!outputs"))
    except (OSError, subprocess.CalledProcessError):
        return None, None


def _git(*arguments: str) -> str:
    command = ["git", "-C", str(REPOSITORY), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
