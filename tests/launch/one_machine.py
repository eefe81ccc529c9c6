"""A SLURM cluster of two nodes on this machine: munged, slurmctld and two slurmd in a folder of their own.

Ports, socket, key and state are its own, so it runs beside another cluster; it needs neither systemd nor a resolvable
host name. It leaves no process behind.
"""

import contextlib
import os
import random
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

PROGRAMS = ("setpriv", "munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "scancel", "squeue")
START_SECONDS = 180
"""The daemons are there in five; an ended one is noticed at once."""

_CONF = """\
ClusterName=one
FirstJobId={first_job}
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CryptoType=crypto/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/slurmd-%n
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldPidFile={folder}/slurmctld.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SwitchType=switch/none
ReturnToService=2
SlurmdParameters=config_overrides
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=1,bf_interval=1
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/none
JobAcctGatherType=jobacct_gather/none
KillWait=10
MinJobAge=900
InactiveLimit=0
# Patient, so that a loaded machine does not look like a dead node: the start of a batch script has 10 s by default, and one
# that needs longer goes back into the queue.
BatchStartTimeout=120
MessageTimeout=60
TCPTimeout=30
SlurmctldTimeout=300
SlurmdTimeout=300
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=4 State=UNKNOWN
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=4 State=UNKNOWN
PartitionName=all Nodes=n1,n2 Default=YES MaxTime=INFINITE State=UP OverSubscribe=YES
"""


def missing_programs() -> list[str]:
    """Return what a cluster on this machine lacks, in words."""
    found = os.environ["PATH"] + ":/usr/sbin:/sbin"
    missing = [name for name in PROGRAMS if shutil.which(name, path=found) is None]
    if os.geteuid() != 0:
        missing.append("root (slurmd starts jobs for other users)")
    return missing


@contextlib.contextmanager
def one_machine_cluster() -> Iterator[dict[str, str]]:
    """Start the cluster and yield the environment in which sbatch and the others find it; stop it at the end.

    What the daemons logged is printed when the block fails.
    """
    # Not below pytest's folder: the path of munged's socket must stay under 108 characters.
    with tempfile.TemporaryDirectory(prefix="one-machine-cluster-") as name:
        folder = Path(name)
        environment = _write_settings(folder)
        daemons: list[subprocess.Popen[bytes]] = []
        try:
            for command in _commands(folder):
                with open(folder / f"{command[0]}.out", "ab") as out:
                    bound = ["setpriv", "--pdeathsig", "TERM", *command]  # not even a killed test leaves one behind
                    daemons.append(subprocess.Popen(bound, env=environment, stdout=out, stderr=out))
                if command[0] == "munged":
                    _wait_for((folder / "munge.socket").exists, "munged's socket", daemons)
            _wait_for(lambda: _idle_nodes(environment) == 2, "two idle nodes", daemons)
            yield environment
        except BaseException:
            for log in sorted([*folder.glob("*.log"), *folder.glob("*.out")]):
                print(f"--- {log.name}", *log.read_text(errors="replace").splitlines()[-60:], sep="\n")
            raise
        finally:
            _stop(daemons, environment, folder)


def _write_settings(folder: Path) -> dict[str, str]:
    folder.chmod(0o755)
    (folder / "state").mkdir()
    key = folder / "munge.key"
    key.write_bytes(os.urandom(1024))
    key.chmod(0o400)
    # SLURM shortens the names that it compares. A job's number chooses the port of its ranks: no two clusters share one.
    host, first_job = socket.gethostname().split(".")[0], random.randrange(1, 11_000)
    conf = folder / "slurm.conf"
    conf.write_text(_CONF.format(host=host, ports=_free_ports(3), folder=folder, first_job=first_job))
    return os.environ | {"SLURM_CONF": str(conf), "PATH": os.environ["PATH"] + ":/usr/sbin:/sbin"}


def _commands(folder: Path) -> list[list[str]]:
    munged = ["munged", "--foreground", "--force", f"--socket={folder}/munge.socket", f"--key-file={folder}/munge.key"]
    munged += [f"--{file}-file={folder}/munged.{file}" for file in ("pid", "log", "seed")]
    return [munged, ["slurmctld", "-D"], ["slurmd", "-D", "-N", "n1"], ["slurmd", "-D", "-N", "n2"]]


def _stop(daemons: list[subprocess.Popen[bytes]], environment: dict[str, str], folder: Path) -> None:
    """End the jobs, then the daemons: the processes of a job outlive daemons that go first."""
    _output(environment, "scancel", "--user=root")
    end = time.monotonic() + 60
    while _output(environment, "squeue", "--noheader") and time.monotonic() < end:
        time.sleep(0.1)
    for daemon in reversed(daemons):
        daemon.send_signal(signal.SIGTERM)
        try:
            daemon.wait(20)
        except subprocess.TimeoutExpired:
            daemon.kill()
            daemon.wait()
    for number in _processes_of(folder):  # of a job that could not be ended
        with contextlib.suppress(ProcessLookupError):
            os.kill(number, signal.SIGKILL)


def _processes_of(folder: Path) -> list[int]:
    """Return the processes whose environment has this cluster's settings."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it has ended meanwhile
            if f"SLURM_CONF={folder}/".encode() in (process / "environ").read_bytes():
                found.append(int(process.name))
    return found


def _free_ports(count: int) -> list[int]:
    """Return ports below those that outgoing connections take."""
    free: list[int] = []
    while len(free) < count:
        port = random.randrange(10_000, 20_000)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("", port))
            free.extend({port} - set(free))
    return free


def _output(environment: dict[str, str], *command: str) -> str:
    """Return what a program of SLURM says; nothing where it has no answer within a minute."""
    with contextlib.suppress(subprocess.TimeoutExpired):
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=60)
        return done.stdout
    return ""


def _idle_nodes(environment: dict[str, str]) -> int:
    return _output(environment, "sinfo", "--noheader", "--Node", "--format=%N %T").count(" idle")


def _wait_for(condition: Callable[[], bool], what: str, daemons: list[subprocess.Popen[bytes]]) -> None:
    end = time.monotonic() + START_SECONDS
    while not condition():
        ended = [daemon.args for daemon in daemons if daemon.poll() is not None]
        assert not ended, f"{what}: {ended} ended"
        assert time.monotonic() < end, f"{what} did not come within {START_SECONDS} s"
        time.sleep(0.1)
