"""A whole SLURM on this machine for the tests: one controller, fourteen nodes with a GPU each that is a plain file, two partitions.

Jobs of `high` preempt those of `low`, which are told (preempt_send_user_signal) and requeued. Debian's packages are installed where
that is possible; everything else is in a folder of its own, and no service of the machine is touched.
"""

import contextlib
import getpass
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil

from visionloom.tests.debian import install

PACKAGES = ("slurmctld", "slurmd", "slurm-client", "munge")
PROGRAMS = ("slurmctld", "slurmd", "sbatch", "munged")
NODES = 14
GRACE = 60
"""Seconds of a preempted job until it is killed; one that has saved ends before."""
CONFIG = """
ClusterName=tests
SlurmctldHost={host}(127.0.0.1)
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/munge/socket,cred_expire=5
SlurmctldPort={port}
SlurmctldPidFile={folder}/controller.pid
SlurmdPidFile={folder}/%n.pid
SlurmdSpoolDir={folder}/spool/%n
StateSaveLocation={folder}/state
SlurmctldLogFile={folder}/controller.log
SlurmdLogFile={folder}/%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
MpiDefault=none
ReturnToService=2
SwitchType=switch/none
SchedulerParameters=sched_interval=2,batch_sched_delay=0,bf_interval=2
KillWait=20
MinJobAge=3600
SlurmdTimeout=10
JobRequeue=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldParameters=preempt_send_user_signal
GresTypes=gpu
NodeName=DEFAULT CPUs=2 RealMemory=2000 Gres=gpu:1
"""
PARTITIONS = f"""
PartitionName=low Nodes=ALL Default=YES PriorityTier=1 PreemptMode=REQUEUE GraceTime={GRACE} State=UP
PartitionName=high Nodes=ALL PriorityTier=10 PreemptMode=OFF State=UP
"""


def free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as open_sockets:
        sockets = [open_sockets.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


class Cluster:
    """The daemons, and questions to them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.nodes = [f"n{number}" for number in range(1, NODES + 1)]
        self.environment = os.environ | {"SLURM_CONF": str(folder / "slurm.conf")}

    def start(self) -> None:
        """Begin the daemons, and wait until all nodes are idle."""
        for name in ("munge", "state", *(f"spool/{node}" for node in self.nodes)):
            (self.folder / name).mkdir(parents=True)
        self.folder.chmod(0o755)  # munged looks at it
        (self.folder / "munge").chmod(0o755)
        key = self.folder / "munge" / "key"
        key.write_bytes(os.urandom(1024))
        key.chmod(0o600)
        self._configure()
        names = {
            "key-file": key,
            "socket": key.with_name("socket"),
            "seed-file": key.with_name("seed"),
        }
        names |= {"pid-file": self.folder / "munged.pid", "log-file": self.folder / "munged.log"}
        self.ask("munged", "--force", *(f"--{name}={path}" for name, path in names.items()))
        self.ask("slurmctld", "-c")
        for node in self.nodes:
            self.begin_node(node)
        wait_for(
            lambda: self.ask("sinfo", "-h", "-t", "idle", "-o", "%D").split()[:1] == [str(NODES)],
            60,
        )

    def _configure(self) -> None:
        port, *ports = free_ports(NODES + 1)
        host = socket.gethostname().partition(".")[0]
        values = {"host": host, "user": getpass.getuser(), "folder": self.folder, "port": port}
        lines, devices = [CONFIG.format(**values)], []
        for node, each in zip(self.nodes, ports, strict=True):
            (self.folder / f"gpu-{node}").touch()
            lines.append(f"NodeName={node} NodeHostname={host} NodeAddr=127.0.0.1 Port={each}\n")
            devices.append(f"NodeName={node} Name=gpu File={self.folder}/gpu-{node}\n")
        (self.folder / "slurm.conf").write_text("".join([*lines, PARTITIONS]))
        (self.folder / "gres.conf").write_text("".join(devices))

    def begin_node(self, node: str) -> None:
        self.ask("slurmd", "-N", node)

    def ask(self, *words: str) -> str:
        """Run a command of SLURM and return what it prints."""
        done = subprocess.run(
            words, env=self.environment, capture_output=True, text=True, timeout=60, check=False
        )
        assert done.returncode == 0, f"{words}: {done.stderr}"
        return done.stdout

    def fact(self, job: str, name: str) -> str:
        """Return what `scontrol show job` says of one of its facts."""
        words = self.ask("scontrol", "show", "job", "-o", job).split()
        return next(word.partition("=")[2] for word in words if word.startswith(f"{name}="))

    def nodes_of(self, job: str) -> list[str]:
        return self.ask("scontrol", "show", "hostnames", self.fact(job, "NodeList")).split()

    def kill_node(self, node: str, job: str) -> None:
        """Take a node away as a power cut does: its daemon, the one of the job's step, and all that it started."""
        victims: set[psutil.Process] = {
            psutil.Process(int((self.folder / f"{node}.pid").read_text()))
        }
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                variables = process.environ()
                if (variables.get("SLURMD_NODENAME"), variables.get("SLURM_JOB_ID")) == (node, job):
                    victims.add(process)
                    victims |= {each for each in process.parents() if "slurmstepd" in each.name()}
        for victim in victims:
            with contextlib.suppress(psutil.Error):
                victim.send_signal(signal.SIGKILL)

    def stop(self) -> None:
        """End what is left of jobs, then the daemons, by the numbers that they wrote down."""
        with contextlib.suppress(AssertionError):
            self.ask("scancel", "--user", getpass.getuser(), "--signal=KILL", "--full")
            self.ask("scancel", "--user", getpass.getuser())
            with contextlib.suppress(TimeoutError):
                wait_for(lambda: not self.ask("squeue", "-h"), 40)
        for place in self.folder.glob("*.pid"):
            with contextlib.suppress(ValueError, ProcessLookupError):
                os.kill(int(place.read_text()), signal.SIGTERM)
        shutil.rmtree(self.folder, ignore_errors=True)


def wait_for(condition: Callable[[], Any], seconds: float) -> None:
    """Wait until something is so; TimeoutError if it is not in time."""
    until = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > until:
            raise TimeoutError
        time.sleep(0.2)


@contextlib.contextmanager
def cluster_here() -> Iterator[Cluster]:
    """A running SLURM, whose configuration the environment names meanwhile."""
    if not all(map(shutil.which, PROGRAMS)):
        install("SLURM", *PACKAGES)
    # Not pytest's folder: the path of munge's socket has at most 108 bytes.
    cluster = Cluster(Path(tempfile.mkdtemp(prefix="slurm-")))
    before = os.environ.get("SLURM_CONF")
    os.environ["SLURM_CONF"] = cluster.environment["SLURM_CONF"]
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()
        if before is None:
            del os.environ["SLURM_CONF"]
        else:
            os.environ["SLURM_CONF"] = before
