"""A SLURM cluster of one machine, from Debian's packages: munged, slurmctld, two slurmd; needs root."""

import contextlib
import os
import secrets
import shutil
import socket
import subprocess
import time
from pathlib import Path

PROGRAMS = ("sbatch", "slurmctld", "slurmd", "munged")
PACKAGES = "slurm-wlm munge"


def what_is_missing() -> str:
    """Return why a cluster cannot be started here; empty = it can."""
    missing = [name for name in PROGRAMS if shutil.which(name) is None]
    if missing:
        return f"{', '.join(missing)} not installed (apt-get install {PACKAGES})"
    return "" if os.geteuid() == 0 else "slurmd must be started by root"


class SlurmCluster:
    """While entered, the commands of SLURM talk to it, through the environment variable SLURM_CONF."""

    def __init__(self, folder: Path, nodes: int = 2) -> None:
        self._folder, self._nodes = folder, nodes
        self._daemons: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> "SlurmCluster":
        with contextlib.ExitStack() as stack:
            stack.callback(self.__exit__)
            self._start_all()
            stack.pop_all()
        return self

    def _start_all(self) -> None:
        for name in ("state", "spool", "log"):
            (self._folder / name).mkdir(parents=True)
        self._start_munge()
        conf = self._folder / "slurm.conf"
        conf.write_text(self._configuration())
        (self._folder / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")  # where there are none, nothing is done
        os.environ["SLURM_CONF"] = str(conf)
        self._start("slurmctld", "-D")
        for number in range(self._nodes):
            self._start("slurmd", "-D", "-N", f"n{number}")
        deadline = time.monotonic() + 60
        while "idle" not in self.command("sinfo", "-h", "-o", "%T"):
            assert time.monotonic() < deadline, self.log()
            time.sleep(0.3)

    def __exit__(self, *_: object) -> None:
        subprocess.run(["scancel", "--user=root"], check=False, capture_output=True)
        time.sleep(1)
        for daemon in reversed(self._daemons):
            daemon.terminate()
        for daemon in self._daemons:
            try:
                daemon.wait(20)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()
        os.environ.pop("SLURM_CONF", None)

    def command(self, *words: str) -> str:
        """Run a command of SLURM and return what it prints."""
        done = subprocess.run(words, capture_output=True, text=True, check=False)
        return done.stdout + done.stderr

    def state_of(self, job: str) -> str:
        """Return a job's state, such as RUNNING, with the reason of one that waits."""
        text = self.command("scontrol", "show", "job", job)
        fields = dict(word.split("=", 1) for word in text.split() if "=" in word)
        return fields.get("JobState", "GONE")

    def wait_for(self, job: str, *states: str, seconds: float = 180) -> str:
        """Wait until a job is in one of the states; return which."""
        deadline = time.monotonic() + seconds
        while (state := self.state_of(job)) not in states:
            assert time.monotonic() < deadline, f"job {job} is {state}: {self.command('squeue')}{self.log()}"
            time.sleep(0.2)
        return state

    def log(self) -> str:
        """Return the ends of the daemons' logs."""
        return "\n".join(file.read_text(errors="replace")[-1500:] for file in sorted((self._folder / "log").iterdir()))

    def _start_munge(self) -> None:
        key = self._folder / "munge.key"
        key.write_bytes(secrets.token_bytes(128))
        key.chmod(0o400)
        self._folder.chmod(0o755)
        names = {option: self._folder / f"munge.{option}" for option in ("socket", "pid", "seed", "log")}
        options = [f"--socket={names['socket']}", f"--pid-file={names['pid']}", f"--seed-file={names['seed']}"]
        self._start("munged", "--foreground", "--force", f"--key-file={key}", *options, f"--log-file={names['log']}")
        deadline = time.monotonic() + 20
        while not names["socket"].exists():
            assert time.monotonic() < deadline, self.log()
            time.sleep(0.1)

    def _start(self, program: str, *words: str) -> None:
        with (self._folder / "log" / f"{len(self._daemons)}-{program}.log").open("wb") as log:
            self._daemons.append(
                subprocess.Popen([program, *words], stdout=log, stderr=log, start_new_session=True, cwd=self._folder)
            )

    def _configuration(self) -> str:
        host = socket.gethostname()
        lines = [
            "ClusterName=test",
            f"SlurmctldHost={host}(127.0.0.1)",
            "SlurmctldPort=16817",
            "AuthType=auth/munge",
            # A requeued job waits until its old credential has expired.
            f"AuthInfo=socket={self._folder}/munge.socket,cred_expire=5",
            "SlurmUser=root",
            "SlurmdUser=root",
            f"StateSaveLocation={self._folder}/state",
            f"SlurmdSpoolDir={self._folder}/spool/%n",
            f"SlurmctldPidFile={self._folder}/slurmctld.pid",
            f"SlurmdPidFile={self._folder}/slurmd-%n.pid",
            "ProctrackType=proctrack/linuxproc",
            "TaskPlugin=task/none",
            "MpiDefault=none",
            "ReturnToService=2",
            "SelectType=select/cons_tres",
            "SelectTypeParameters=CR_CPU",
            "SlurmdParameters=config_overrides",  # more processors than there are, so that jobs run side by side
            "JobRequeue=1",
            "KillWait=30",
            "SchedulerParameters=sched_interval=2,bf_interval=2",
        ]
        lines += [
            f"NodeName=n{number} NodeHostname={host} NodeAddr=127.0.0.1 Port={16820 + number} CPUs=4 RealMemory=1000"
            for number in range(self._nodes)
        ]
        lines.append(f"PartitionName=main Nodes=n[0-{self._nodes - 1}] Default=YES MaxTime=INFINITE State=UP")
        return "\n".join(lines) + "\n"
