"""Runs a command inside a memory limit and reports its peak.

    python benchmarks/memory/memory_limit.py --limit 5GiB -- python -m nnprune.run runtime=low_memory
    python benchmarks/memory/memory_limit.py --limit 5GiB --cgroup /sys/fs/cgroup/mine -- COMMAND
    python benchmarks/memory/memory_limit.py -- COMMAND                                              only measure

Mechanisms, in the order in which `auto` tries them:

cgroup    A cgroup, version 2 or 1, made below --cgroup DIR. The kernel enforces it. A cgroup belongs to the one program
          that manages it, so DIR must be named: one that is yours to write, with the memory controller enabled for its
          children.
systemd   `systemd-run --scope`: systemd makes the cgroup.
watchdog  Reads the memory of the command's processes 20 times a second and kills them once they pass the limit. What
          counts is what the kernel could not take back: RssAnon + RssShmem of /proc/PID/status. Pages of mapped and
          read files do not count, and unlike in a cgroup files in tmpfs that nobody maps do not either. A process
          can be over the limit for as long as the time between two readings, of which the report gives the longest.
rlimit    `ulimit -v`, by --mechanism only: it bounds addresses and not memory, and a mapped safetensors file counts in
          full though hardly a page of it may be in memory. A command over it is not killed, its allocations fail.

In a cgroup the page cache of files counts too, but is dropped when room is needed: a peak "with page cache" at the limit
means only that files were read. Swap is not allowed there; the watchdog does not see it.

The report goes to standard error, and to a file with --json. Exit status: 137 if a process of the command was killed for
its memory, else the command's, 128 + N if signal N ended it.
"""

import argparse
import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the packages of this checkout

from benchmarks.memory.cgroups import Cgroup, make_cgroup, remove_cgroup, scope_of, systemd_run

MECHANISMS = ("cgroup", "systemd", "watchdog", "rlimit")
UNITS = {"": 1, "K": 1024, "M": 1024**2, "G": 1024**3, "T": 1024**4}
INTERVAL = 0.05
"""Seconds between two readings."""


@dataclass
class Report:
    """What became of a command.

    mechanism: one of MECHANISMS, or "none" where nothing was limited.
    exit_status: as of a shell: 128 + N if signal N ended the command.
    killed_by: "watchdog", "kernel" (out of memory in the cgroup), or None.
    peak_anon_bytes: largest sum of RssAnon + RssShmem over the command's processes, of all readings. Can't be taken back.
    peak_resident_bytes: largest resident memory of a single process, with mapped files, by the kernel's own count (VmHWM).
    peak_cgroup_bytes: the cgroup's own peak, with page cache; None without a cgroup, or a kernel that does not tell.
    longest_gap: seconds between two readings, at most.
    """

    command: list[str]
    mechanism: str
    limit_bytes: int | None
    exit_status: int = 0
    killed_by: str | None = None
    peak_anon_bytes: int = 0
    peak_resident_bytes: int = 0
    peak_cgroup_bytes: int | None = None
    num_readings: int = 0
    longest_gap: float = 0.0
    seconds: float = 0.0

    def __str__(self) -> str:
        limit = f"limit {size(self.limit_bytes)} by {self.mechanism}" if self.limit_bytes else "no limit"
        end = f"killed by the {self.killed_by}" if self.killed_by else f"exit status {self.exit_status}"
        cgroup = f", cgroup with page cache {size(self.peak_cgroup_bytes)}" if self.peak_cgroup_bytes else ""
        return (
            f"memory_limit: {limit}; {end} after {self.seconds:.1f} s; peaks: anonymous {size(self.peak_anon_bytes)}, "
            f"resident {size(self.peak_resident_bytes)}{cgroup}; {self.num_readings} readings, "
            f"at most {self.longest_gap:.2f} s apart"
        )


def size(num_bytes: int) -> str:
    return f"{num_bytes / 1024**2:.0f} MiB"


def parse_size(text: str) -> int:
    """Bytes meant by 5GiB, 5G (both binary), 5GB (decimal) or 5000000. Raises ValueError for anything else."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?) ?(?:([KMGT]?)(i?B)?)", text)
    if not match or (match[3] == "iB" and not match[2]):
        raise ValueError(f"{text}: no size such as 5GiB or 500MB")
    if match[3] == "B" and match[2]:
        return int(float(match[1]) * 1000 ** "KMGT".index(match[2]) * 1000)
    return int(float(match[1]) * UNITS[match[2]])


def run_limited(command: list[str], limit: int | None, mechanism: str, parent: Path | None = None, **popen) -> Report:
    """Run `command` with at most `limit` bytes (None: any) and wait for its end.

    Args:
        mechanism: one of MECHANISMS; without meaning where there is no limit.
        parent: the folder of the cgroup below which to make one, for mechanism "cgroup".
        popen: further arguments for subprocess.Popen.

    Raises:
        OSError: the command or the cgroup cannot be had.
    """
    report = Report(command, mechanism if limit else "none", limit)
    with _enforced(report.mechanism, limit, parent) as (prefix, cgroup):
        start = last = time.monotonic()
        process = subprocess.Popen([*prefix, *command], start_new_session=True, **popen)
        try:
            ended = 0
            while not ended:
                if report.mechanism == "systemd" and cgroup is None:
                    cgroup = scope_of(process.pid)
                anon = _read_processes(process.pid, report)
                _read_cgroup(cgroup, report)
                if report.mechanism == "watchdog" and anon > limit:
                    report.killed_by = "watchdog"
                    _kill_session(process.pid)
                report.longest_gap = max(report.longest_gap, time.monotonic() - last)
                last = time.monotonic()
                time.sleep(INTERVAL)
                ended, status, usage = os.wait4(process.pid, os.WNOHANG)
        finally:
            _kill_session(process.pid)  # whatever the command, or an interrupted run of it, left behind
        process.returncode = os.waitstatus_to_exitcode(status)
        _read_cgroup(cgroup, report)
    report.seconds = time.monotonic() - start
    report.exit_status = process.returncode if process.returncode >= 0 else 128 - process.returncode
    report.peak_resident_bytes = max(report.peak_resident_bytes, usage.ru_maxrss * 1024)
    return report


def choose_mechanism(parent: Path | None) -> str:
    """The first mechanism that works here."""
    if parent is not None:
        return "cgroup"
    if shutil.which("systemd-run") and Path("/run/systemd/system").exists():
        trial = subprocess.run([*systemd_run(1024**3), "true"], capture_output=True)
        if trial.returncode == 0:
            return "systemd"
    return "watchdog"


@contextlib.contextmanager
def _enforced(mechanism: str, limit: int | None, parent: Path | None) -> Iterator[tuple[list[str], Cgroup | None]]:
    """What to put before the command, and the cgroup it will be in, where that is known."""
    if mechanism == "systemd":
        yield systemd_run(limit), None
    elif mechanism == "rlimit":
        yield ["sh", "-c", 'ulimit -v "$1" && shift && exec "$@"', "sh", str(limit // 1024)], None
    elif mechanism == "cgroup":
        if parent is None:
            raise OSError("--cgroup DIR is missing: the cgroup below which to make one")
        cgroup = make_cgroup(parent, limit)
        try:
            # The shell joins before the command starts, so that all of its memory counts.
            join = ["sh", "-c", 'echo $$ > "$1" && shift && exec "$@"', "sh", str(cgroup.folder / "cgroup.procs")]
            yield join, cgroup
        finally:
            remove_cgroup(cgroup)
    else:
        yield [], None


def _read_cgroup(cgroup: Cgroup | None, report: Report) -> None:
    if cgroup:
        report.peak_cgroup_bytes = cgroup.peak() or report.peak_cgroup_bytes
        if cgroup.has_killed():
            report.killed_by = "kernel"


def _session(leader: int) -> Iterator[str]:
    """Process ids of a session."""
    for pid in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError):
            stat = Path(f"/proc/{pid}/stat").read_text(errors="replace")
            if int(stat.rpartition(")")[2].split()[3]) == leader:  # state, parent, group, session; a name may hold anything
                yield pid


def _read_processes(leader: int, report: Report) -> int:
    """The memory of a session's processes that can't be taken back, in bytes now; peaks go to the report."""
    anon = 0
    for pid in _session(leader):
        with contextlib.suppress(OSError):
            lines = Path(f"/proc/{pid}/status").read_text(errors="replace").splitlines()
            fields = {key: value.split() for key, _, value in (line.partition(":") for line in lines)}
            kib = {key: int(fields[key][0]) for key in ("VmHWM", "RssAnon", "RssShmem") if key in fields}  # none in zombies
            anon += 1024 * (kib.get("RssAnon", 0) + kib.get("RssShmem", 0))
            report.peak_resident_bytes = max(report.peak_resident_bytes, 1024 * kib.get("VmHWM", 0))
    report.peak_anon_bytes = max(report.peak_anon_bytes, anon)
    report.num_readings += 1
    return anon


def _kill_session(leader: int) -> None:
    for pid in _session(leader):
        with contextlib.suppress(ProcessLookupError):
            os.kill(int(pid), signal.SIGKILL)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--limit", type=parse_size, metavar="SIZE", help="such as 5GiB or 500MB; none: only measure")
    parser.add_argument("--mechanism", choices=("auto", *MECHANISMS), default="auto")
    parser.add_argument("--cgroup", type=Path, metavar="DIR", help="the cgroup below which to make one")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the report there too")
    parser.add_argument("command", nargs="+", help="after --")
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that the command is ended too
    mechanism = choose_mechanism(args.cgroup) if args.mechanism == "auto" else args.mechanism
    try:
        report = run_limited(args.command, args.limit, mechanism, args.cgroup)
    except OSError as error:
        sys.exit(f"memory_limit.py: {error}")
    print(report, file=sys.stderr)
    if args.json:
        args.json.write_text(json.dumps(asdict(report), indent=1) + "\n")
    sys.exit(128 + signal.SIGKILL if report.killed_by else report.exit_status)


if __name__ == "__main__":
    main()
