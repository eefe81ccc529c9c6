"""What launch/slurm.sh asks the cluster for; changes nothing of what a run computes."""

from dataclasses import dataclass, field

from nanotrain.config.errors import UserError


@dataclass
class ClusterConfig:
    """The group `cluster` (configs/cluster/). Stages that do not train always take one node and one rank."""

    nodes: int = 1
    ranks_per_node: int = 1
    """One rank a GPU."""
    cpus_per_rank: int = 1
    gpus_per_node: int = 0
    time_minutes: int = 60
    """Limit of one job; one that comes to it saves, and continues in the queue as the same job."""
    signal_seconds: int = 120
    """The ranks are told so long before the limit; must cover one step and one save."""
    restarts: int = 3
    """Within a job, from the newest state, after a rank has died."""
    partition: str = ""
    account: str = ""
    extra: list[str] = field(default_factory=list)
    """Further options of sbatch, such as `--exclusive`."""
    setup: list[str] = field(default_factory=list)
    """Shell lines before the start, such as `module load cuda`."""

    def validate(self, path: str) -> None:
        """Raise UserError when SLURM could not carry it out."""
        least = {"nodes": 1, "ranks_per_node": 1, "cpus_per_rank": 1, "gpus_per_node": 0, "time_minutes": 1}
        for name, minimum in (least | {"signal_seconds": 1, "restarts": 0}).items():
            if self.__dict__[name] < minimum:
                raise UserError(f"`{path}.{name}` ({self.__dict__[name]}) must be at least {minimum}.")
        if self.signal_seconds >= 60 * self.time_minutes:
            raise UserError(
                f"`{path}.signal_seconds` ({self.signal_seconds}) must be less than `time_minutes` ({self.time_minutes}), or"
                " every job would be told to stop when it starts."
            )
        if self.gpus_per_node and self.ranks_per_node != self.gpus_per_node:
            raise UserError(
                f"`{path}.ranks_per_node` ({self.ranks_per_node}) must equal `gpus_per_node` ({self.gpus_per_node}): one rank"
                " a GPU."
            )
        for option in self.extra:
            if not option.startswith("--") or "\n" in option:
                raise UserError(f"`{path}.extra` ({option!r}) must list options of sbatch, each starting with `--`.")
