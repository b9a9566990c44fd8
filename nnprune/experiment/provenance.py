"""Where a figure came from: versions of packages, and the commit of this one."""

import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from nnprune.kernels import sweep_triton
from nnprune.kernels.library import library

PACKAGES = ("nnprune", "torch", "transformers", "datasets", "hydra-core", "safetensors")
REPOSITORY = Path(__file__).parent.parent.parent


def versions(device_type: str) -> dict[str, str]:
    """Package -> version, and Python's; `kernels`: what other than PyTorch could compute on a device of this type ("cpu", "cuda")."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:  # a checkout that was never installed
            found[package] = "not installed"
    found["kernels"] = _kernels(device_type)
    return found


def _kernels(device_type: str) -> str:
    if device_type == "cpu":
        return "PyTorch" if library() is None else "C"
    return "Triton" if sweep_triton.available() else "PyTorch"


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
