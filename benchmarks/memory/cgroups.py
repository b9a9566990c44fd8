"""Cgroups, versions 1 and 2, made by us or by systemd: a memory limit that the kernel enforces."""

import contextlib
import os
import re
import sys
import time
from pathlib import Path


class Cgroup:
    """A cgroup with a command in it.

    Args:
        folder: its files.
        counter: the cgroup whose count of killed processes tells: itself, or one around it that lives longer.
    """

    def __init__(self, folder: Path, counter: Path) -> None:
        self.folder = folder
        self.counter = counter
        self._kills_before = self._kills()

    def peak(self) -> int | None:
        """Largest use of memory with page cache, in bytes; None once it is gone, and where the kernel does not tell."""
        for name in ("memory.peak", "memory.max_usage_in_bytes"):
            with contextlib.suppress(OSError):
                return int((self.folder / name).read_text())
        return None

    def has_killed(self) -> bool:
        """Whether the kernel has killed a process for want of memory since this object was made."""
        return self._kills() > self._kills_before

    def _kills(self) -> int:
        for name in ("memory.events", "memory.oom_control"):
            with contextlib.suppress(OSError):
                return int(re.search(r"^oom_kill (\d+)", (self.counter / name).read_text(), re.MULTILINE)[1])
        return 0


def make_cgroup(parent: Path, limit: int) -> Cgroup:
    """A new cgroup of at most `limit` bytes and no swap, below `parent`. Raises OSError when it cannot be made."""
    folder = parent / f"memory-limit-{os.getpid()}"
    folder.mkdir()
    try:
        if (folder / "memory.max").exists():  # version 2
            settings = {"memory.max": limit, "memory.swap.max": 0, "memory.oom.group": 1}
        elif (folder / "memory.limit_in_bytes").exists():  # version 1; memsw is memory and swap together
            settings = {"memory.limit_in_bytes": limit, "memory.memsw.limit_in_bytes": limit}
        else:
            raise OSError(f"{parent}: does not give its children the memory controller")
        for name, value in settings.items():
            if "sw" not in name or (folder / name).exists():  # kernels without swap have no such file
                (folder / name).write_text(str(value))
    except OSError:
        folder.rmdir()
        raise
    return Cgroup(folder, folder)


def remove_cgroup(cgroup: Cgroup) -> None:
    """Remove a cgroup whose processes have ended or are about to."""
    for _ in range(100):  # killed processes take a moment to leave
        with contextlib.suppress(OSError):
            return cgroup.folder.rmdir()
        time.sleep(0.05)
    print(f"memory_limit: {cgroup.folder} still has processes in it; remove it by hand", file=sys.stderr)


def systemd_run(limit: int) -> list[str]:
    """What to put before a command, so that systemd runs it in a cgroup of at most `limit` bytes and no swap."""
    user = [] if os.geteuid() == 0 else ["--user"]
    return ["systemd-run", *user, "--scope", "--quiet", "-p", f"MemoryMax={limit}", "-p", "MemorySwapMax=0", "--"]


def scope_of(pid: int) -> Cgroup | None:
    """The cgroup, version 2, of a process that systemd has put into a scope of its own."""
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/cgroup").read_text().splitlines():
            if line.startswith("0::/") and re.search(r"/run-\w+\.scope$", line):
                folder = Path("/sys/fs/cgroup") / line.removeprefix("0::/")
                return Cgroup(folder, folder.parent)  # systemd removes a scope as soon as it has failed
    return None
