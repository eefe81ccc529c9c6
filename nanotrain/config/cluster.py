"""What a stage asks of a SLURM cluster; read by launch/slurm.sh, no part of what a run computes."""

import re
from dataclasses import dataclass, field

from nanotrain.config.errors import UserError

_TIME = re.compile(r"(\d+-)?\d{1,2}:\d{2}:\d{2}|\d+")
_MANAGED = (
    "dependency",
    "requeue",
    "no-requeue",
    "signal",
    "output",
    "error",
    "open-mode",
    "job-name",
    "wrap",
    "array",
)


@dataclass
class ClusterConfig:
    """The group `cluster` (configs/cluster/). Stages that do not train take one node and one rank of it."""

    nodes: int = 1
    """Of a stage that trains."""
    gpus_per_node: int = 8
    """0 = ranks on CPUs."""
    ranks_per_node: int = 0
    """0 = one for each GPU, one where there is none."""
    cpus_per_rank: int = 0
    """0 = what the cluster gives by default."""
    time_limit: str = "04:00:00"
    """Of one job, in SLURM's form (minutes, hours:minutes:seconds, days-hours:minutes:seconds); a stage that needs longer
    saves, is requeued and continues."""
    signal_seconds: int = 300
    """So long before the time limit the ranks are told to save and stop."""
    max_restarts: int = 3
    """A job that failed is put back into the queue so many times; one that was stopped and has saved, always."""
    partition: str = ""
    account: str = ""
    sbatch: list[str] = field(default_factory=list)
    """Further options of sbatch, for example `--constraint=h100`."""
    setup: list[str] = field(default_factory=list)
    """Lines of shell that run on the first node before the ranks start, for example `module load cuda`."""

    @property
    def ranks(self) -> int:
        """Ranks on each node."""
        return self.ranks_per_node or self.gpus_per_node or 1

    @property
    def world_size(self) -> int:
        """Ranks of a stage that trains."""
        return self.nodes * self.ranks

    def validate(self, path: str) -> None:
        """Raise UserError when a value is out of range or an option would undo what the launcher relies on."""
        minimum = {"nodes": 1, "gpus_per_node": 0, "ranks_per_node": 0, "cpus_per_rank": 0}
        minimum |= {"signal_seconds": 1, "max_restarts": 0}
        for name, least in minimum.items():
            if self.__dict__[name] < least:
                raise UserError(f"`{path}.{name}` ({self.__dict__[name]}) must be at least {least}.")
        if not _TIME.fullmatch(self.time_limit):
            raise UserError(
                f"`{path}.time_limit` ({self.time_limit}) must be minutes, hours:minutes:seconds or"
                " days-hours:minutes:seconds, for example 04:00:00."
            )
        for option in self.sbatch:
            name = option.removeprefix("--").split("=")[0]
            if not option.startswith("--") or any(letter.isspace() for letter in option):
                raise UserError(f"`{path}.sbatch` holds {option!r}; write each option as --name or --name=value.")
            if name in _MANAGED:
                raise UserError(
                    f"`{path}.sbatch` holds --{name}, which the launcher sets itself; remove it, or write the job"
                    " scripts by hand from `--dry-run`."
                )
