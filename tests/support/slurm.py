"""A Slurm of one node: munged, slurmctld and slurmd of the current user, with all their files in a temporary folder."""

import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from getpass import getuser
from pathlib import Path

PATH = f"{os.environ['PATH']}:/usr/sbin"
"""Daemons are where not every user looks."""

MISSING = [
    name for name in ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol") if not shutil.which(name, path=PATH)
]

STARTS = 20
"""Seconds after which daemons that are not up count as unable to start."""

CONF = """
ClusterName=test
SlurmctldHost=localhost
SlurmUser={user}
SlurmdUser={user}
AuthInfo=socket={folder}/munge.socket,cred_expire=5
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
ProctrackType=proctrack/linuxproc
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=sched_interval=1,bf_interval=1
SlurmdParameters=config_overrides
JobRequeue=0
KillWait=1
MailProg=/bin/true
MpiDefault=none
NodeName={host} NodeAddr=localhost CPUs=2 RealMemory=2000
PartitionName=all Nodes=ALL Default=YES
"""


class CannotStart(Exception):
    """Says why there is no Slurm."""


@contextmanager
def slurm(folder: Path) -> Iterator[Path]:
    """The path for SLURM_CONF while the daemons run in `folder`. Raises CannotStart."""
    (folder / "state").mkdir()
    (folder / "spool").mkdir()
    (folder / "munge.key").write_bytes(os.urandom(1024))
    (folder / "munge.key").chmod(0o400)
    conf = folder / "slurm.conf"
    host = socket.gethostname().partition(".")[0]
    conf.write_text(CONF.format(user=getuser(), folder=folder, host=host, ports=free_ports(2)))
    files = {"key-file": "munge.key", "socket": "munge.socket", "pid-file": "munged.pid", "seed-file": "munge.seed"}
    munged = ["munged", "--foreground", "--force", *(f"--{key}={folder / name}" for key, name in files.items())]
    environment = {**os.environ, "PATH": PATH, "SLURM_CONF": str(conf)}
    daemons = []
    try:
        for command in (munged, ["slurmctld", "-D"], ["slurmd", "-D"]):
            with (folder / f"{command[0]}.log").open("w") as log:
                daemons.append(subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True))
        wait_until_idle(environment, daemons)
        yield conf
    finally:
        subprocess.run(["scancel", "--user", getuser()], env=environment, capture_output=True, check=False)
        for daemon in reversed(daemons):
            daemon.terminate()
            daemon.wait()


def wait_until_idle(environment: dict[str, str], daemons: list[subprocess.Popen]) -> None:
    """Return when the node takes jobs."""
    started = time.monotonic()
    while time.monotonic() - started < STARTS and all(daemon.poll() is None for daemon in daemons):
        found = subprocess.run(["sinfo", "-h", "-o", "%T"], env=environment, capture_output=True, text=True, check=False)
        if found.stdout.strip() == "idle":
            return
        time.sleep(0.2)
    logs = [Path(environment["SLURM_CONF"]).with_name(f"{daemon.args[0]}.log").read_text() for daemon in daemons]
    raise CannotStart(f"Slurm does not start here: {' | '.join(log.strip().rpartition(chr(10))[2] for log in logs)}")


def free_ports(number: int) -> list[int]:
    """Ports that nobody listens on."""
    sockets = [socket.create_server(("localhost", 0)) for _ in range(number)]
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports
