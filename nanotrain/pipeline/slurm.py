"""A pipeline as a chain of SLURM jobs: one for each unfinished entry, started when the one before has succeeded.

srun starts the ranks itself, with no agent between: the signal ahead of the time limit reaches every rank, and a rank
that dies ends the others at once.
"""

import logging
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from nanotrain.config.cluster import ClusterConfig
from nanotrain.config.errors import MissingInputError, UserError
from nanotrain.config.load import LoadedEntry, LoadedRecipe
from nanotrain.config.stage import TRAINING_STAGES
from nanotrain.pipeline.ownership import owned_folder
from nanotrain.runtime.files import write_bytes_atomic

log = logging.getLogger("nanotrain")

FOLDER = "slurm"
"""Below the run's folder: job scripts and logs."""

_RANKS = """\
# Rank 0 listens on the first node; the job's id keeps jobs of one node apart.
first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
MASTER_ADDR=$(scontrol show node "$first" | sed -n 's/.*NodeAddr=\\([^ ]*\\).*/\\1/p')
export MASTER_ADDR MASTER_PORT=$((20000 + SLURM_JOB_ID % 12000))
export WORLD_SIZE=$SLURM_NTASKS LOCAL_WORLD_SIZE={ranks}
"""

# srun ends all ranks when one fails; one that has saved, or refuses a mistake, gives the others time to come to the same
# end. The shell must outlive a signal to hand on the exit code.
_RANK = """\
trap : USR1 TERM
RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID "$@"
code=$?
((code == 75 || code == 2)) && sleep 5
exit $code"""

_AGAIN = """\
code=$?
restarts=${{SLURM_RESTART_COUNT:-0}}
if ((code == 75)); then
  echo "job $SLURM_JOB_ID was stopped and has saved; it goes back into the queue."
  scontrol requeue "$SLURM_JOB_ID"
elif ((code != 0 && code != 2 && restarts < {max_restarts})); then
  echo "job $SLURM_JOB_ID failed with exit code $code; restart $((restarts + 1)) of {max_restarts} from the newest state."
  scontrol requeue "$SLURM_JOB_ID"
fi
exit $code
"""


@dataclass(frozen=True)
class Job:
    """One entry and the script that runs it."""

    entry: str
    script: str


def build_jobs(recipe: LoadedRecipe, entries: list[LoadedEntry], overrides: list[str]) -> list[Job]:
    """Return the jobs of `entries`, in order.

    Args:
        recipe: composed and validated.
        entries: those of it that are to be made.
        overrides: what the recipe was composed with; the jobs compose it again.
    """
    return [Job(entry.name, _script(recipe, entry, overrides)) for entry in entries]


def _script(recipe: LoadedRecipe, entry: LoadedEntry, overrides: list[str]) -> str:
    cluster = entry.config.cluster
    ranks = cluster.ranks if isinstance(entry.config.stage, TRAINING_STAGES) else 1
    only = ["--only", entry.name] if recipe.is_pipeline else []
    command = [sys.executable, "-m", "nanotrain", "run", *only, "--", str(recipe.file), *overrides]
    lines = [
        "#!/bin/bash",
        *(f"#SBATCH {option}" for option in _options(recipe, entry, cluster, ranks)),
        "",
        *cluster.setup,
        _RANKS.format(ranks=ranks),
        f"srun --kill-on-bad-exit=1 bash -c {shlex.quote(_RANK)} rank \\\n  {shlex.join(command)}",
        _AGAIN.format(max_restarts=cluster.max_restarts),
    ]
    return "\n".join(lines)


def _options(recipe: LoadedRecipe, entry: LoadedEntry, cluster: ClusterConfig, ranks: int) -> list[str]:
    """Return sbatch's options; a stage that does not train takes one rank and at most one GPU."""
    trains = isinstance(entry.config.stage, TRAINING_STAGES)
    gpus = cluster.gpus_per_node if trains else min(cluster.gpus_per_node, 1)
    folder = recipe.output_dir.absolute() / FOLDER
    options = [
        f"--job-name={recipe.name}-{entry.name}",
        f"--nodes={cluster.nodes if trains else 1}",
        f"--ntasks-per-node={ranks}",
        f"--time={cluster.time_limit}",
        f"--signal=USR1@{cluster.signal_seconds}",
        "--requeue",
        "--open-mode=append",
        f"--output={folder}/{entry.name}-%j.log",
        f"--chdir={Path.cwd()}",
    ]
    if gpus:
        options.append(f"--gpus-per-node={gpus}")
    if cluster.cpus_per_rank:
        options.append(f"--cpus-per-task={cluster.cpus_per_rank}")
    if cluster.partition:
        options.append(f"--partition={cluster.partition}")
    if cluster.account:
        options.append(f"--account={cluster.account}")
    quoted = [
        f"{name}={shlex.quote(value)}" if value else name for name, _, value in (o.partition("=") for o in options)
    ]
    return [*quoted, *cluster.sbatch]


def submit(recipe: LoadedRecipe, jobs: list[Job]) -> list[tuple[str, str]]:
    """Write the scripts into the run's folder and submit them as a chain.

    Returns:
        (entry, job id) of each.

    Raises:
        UserError: there is no sbatch, or it refuses a job; the jobs before it stay submitted and are named.
    """
    if shutil.which("sbatch") is None:
        raise MissingInputError("`sbatch` is not on this machine; run this on a login node of a SLURM cluster.")
    with owned_folder(recipe):
        folder = recipe.output_dir / FOLDER
        folder.mkdir(exist_ok=True)
        for job in jobs:
            write_bytes_atomic(folder / f"{job.entry}.sbatch", job.script.encode())
    submitted: list[tuple[str, str]] = []
    for job in jobs:
        # A job that can never start, because the one before it failed, leaves the queue by itself.
        after = [f"--dependency=afterok:{submitted[-1][1]}", "--kill-on-invalid-dep=yes"] if submitted else []
        done = subprocess.run(
            ["sbatch", "--parsable", *after, str(folder / f"{job.entry}.sbatch")],
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            before = ", ".join(f"{entry} ({number})" for entry, number in submitted) or "none"
            raise UserError(
                f"sbatch refused the job of {job.entry!r} ({done.stderr.strip() or done.stdout.strip()}); change"
                f" `{job.entry}.cluster`. Submitted before it: {before}."
            )
        submitted.append((job.entry, done.stdout.strip().split(";")[0]))
    return submitted
