"""A real one-node Slurm cluster on this machine, in its own folder, or the reason why it cannot run."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "squeue", "scancel", "sinfo")
# The step that the plugin starts inside a job forgets SLURM_CONF and looks here, as Debian's programs do.
USUAL_PLACE = Path("/etc/slurm/slurm.conf")
CONFIGURATION = """
ClusterName=small
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller}
SlurmdPort={daemon}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
SlurmUser=root
SlurmdUser=root
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
ReturnToService=2
NodeName={host} NodeAddr=127.0.0.1 CPUs=2 RealMemory=1000 State=UNKNOWN
PartitionName=small Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


class NoSlurm(Exception):
    """Why Slurm cannot start here."""


def free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


@contextlib.contextmanager
def small_slurm() -> Iterator[dict[str, str]]:
    """The environment in which sbatch and squeue find the cluster. Raises NoSlurm when it cannot start."""
    # Debian keeps daemons where an ordinary user's path does not lead.
    path = f"{os.environ['PATH']}{os.pathsep}/usr/sbin{os.pathsep}/sbin"
    missing = [name for name in PROGRAMS if shutil.which(name, path=path) is None]
    if missing:
        raise NoSlurm(f"not installed: {', '.join(missing)} (Debian: apt-get install slurm-wlm munge)")
    if os.geteuid() != 0:
        raise NoSlurm("the daemons of a cluster need root")
    if USUAL_PLACE.exists():
        raise NoSlurm(f"{USUAL_PLACE} exists: this machine belongs to a cluster")
    # The path of a socket may have 107 characters.
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="slurm-", ignore_cleanup_errors=True)))
        folder.chmod(0o755)
        key = folder / "munge.key"
        key.write_bytes(os.urandom(1024))
        key.chmod(0o600)
        for name in ("state", "spool"):
            (folder / name).mkdir()
        controller, daemon = free_ports(2)
        configuration = folder / "slurm.conf"
        configuration.write_text(
            CONFIGURATION.format(host=socket.gethostname(), folder=folder, controller=controller, daemon=daemon)
        )
        USUAL_PLACE.parent.mkdir(exist_ok=True)
        USUAL_PLACE.unlink(missing_ok=True)  # a link that leads nowhere
        USUAL_PLACE.symlink_to(configuration)
        stack.callback(USUAL_PLACE.unlink, missing_ok=True)
        environment = {**os.environ, "PATH": path, "SLURM_CONF": str(configuration)}
        files = [f"--{name}-file={folder}/munge.{name}" for name in ("log", "pid", "seed", "key")]
        for command in (
            ["munged", "--foreground", "--force", f"--socket={folder}/munge.socket", *files],
            ["slurmctld", "-D", "-f", str(configuration)],
            ["slurmd", "-D", "-f", str(configuration)],
        ):
            log = stack.enter_context(open(folder / f"{command[0]}.out", "w"))
            process = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
            stack.callback(process.wait)
            stack.callback(process.terminate)
            time.sleep(0.5)
            if process.poll() is not None:
                raise NoSlurm(f"{command[0]} ended: {(folder / f'{command[0]}.out').read_text().strip()[-300:]}")
        for _ in range(60):
            done = subprocess.run(["sinfo", "-h", "-o", "%t"], env=environment, capture_output=True, text=True)
            if done.stdout.strip() == "idle":
                break
            time.sleep(0.5)
        else:
            raise NoSlurm(f"no node became idle: {done.stdout.strip()} {done.stderr.strip()}")
        yield environment
