"""A pipeline as a chain of SLURM jobs: one an entry, each after the one before it has succeeded."""

import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from nanotrain.config.errors import UserError
from nanotrain.config.load import LoadedEntry, LoadedRecipe
from nanotrain.config.load_messages import shown_path
from nanotrain.config.stage import TRAINING_STAGES
from nanotrain.pipeline.ownership import owned_folder
from nanotrain.runtime.files import write_bytes_atomic

FOLDER = "slurm"
"""Below the run's folder: the scripts as submitted, and the log of every job."""


@dataclass(frozen=True)
class Job:
    """One entry's job."""

    entry: str
    script: str


def build_jobs(recipe: LoadedRecipe, recipe_argument: str, overrides: list[str]) -> list[Job]:
    """Return the batch script of every entry, in order.

    Args:
        recipe: composed and validated.
        recipe_argument: the recipe as the user named it.
        overrides: of the recipe, handed on to every job.
    """
    return [Job(entry.name, _script(recipe, entry, recipe_argument, overrides)) for entry in recipe.entries]


def submit(recipe: LoadedRecipe, jobs: list[Job]) -> list[str]:
    """Write the scripts below the run's folder, submit them as a chain, and return the job ids.

    Raises:
        UserError: there is no sbatch, or it refuses a job; those before it are submitted.
    """
    if shutil.which("sbatch") is None:
        raise UserError(
            "`sbatch` is not installed here; submit from a login node of the cluster, or look at `--dry-run`."
        )
    with owned_folder(recipe):
        folder = recipe.output_dir / FOLDER
        ids: list[str] = []
        for job in jobs:
            file = folder / f"{job.entry}.sh"
            write_bytes_atomic(file, job.script.encode())
            chain = [f"--dependency=afterok:{ids[-1]}"] if ids else []
            done = subprocess.run(
                ["sbatch", "--parsable", *chain, str(file)], capture_output=True, text=True, check=False
            )
            if done.returncode:
                raise UserError(
                    f"sbatch refused {shown_path(file)} ({' '.join(done.stderr.split())}); submitted before it:"
                    f" {', '.join(ids) or 'nothing'}."
                )
            ids.append(done.stdout.strip().split(";")[0])
    return ids


def _script(recipe: LoadedRecipe, entry: LoadedEntry, recipe_argument: str, overrides: list[str]) -> str:
    cluster = entry.config.cluster
    trains = isinstance(entry.config.stage, TRAINING_STAGES)
    nodes, ranks = (cluster.nodes, cluster.ranks_per_node) if trains else (1, 1)
    options = [
        f"--job-name={recipe.name}-{entry.name}",
        f"--nodes={nodes}",
        "--ntasks-per-node=1",
        f"--cpus-per-task={ranks * cluster.cpus_per_rank}",
        f"--time={cluster.time_minutes}",
        "--requeue",
        "--open-mode=append",
        f"--signal=USR1@{cluster.signal_seconds}",
        f"--output={(recipe.output_dir / FOLDER).absolute()}/{entry.name}-%j.log",
        f"--chdir={Path.cwd()}",
    ]
    if cluster.gpus_per_node:
        options.append(f"--gpus-per-node={cluster.gpus_per_node if trains else 1}")
    options += [
        f"--{name}={value}" for name, value in (("partition", cluster.partition), ("account", cluster.account)) if value
    ]
    only = ["--only", entry.name] if recipe.is_pipeline else []
    launcher = [sys.executable, "-m", "nanotrain.runtime.torchrun", "--ranks", str(ranks)]
    launcher += ["--restarts", str(cluster.restarts), "--", "run", recipe_argument, *overrides, *only]
    lines = [
        "#!/usr/bin/env bash",
        *(f"#SBATCH {option}" for option in [*options, *cluster.extra]),
        "set -uo pipefail",
        *cluster.setup,
        "export NANOTRAIN_NODES=$SLURM_JOB_NUM_NODES NANOTRAIN_RUN_ID=$SLURM_JOB_ID-${SLURM_RESTART_COUNT:-0}",
        'first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)',
        "export NANOTRAIN_RENDEZVOUS=$first:$((20000 + SLURM_JOB_ID % 20000))",
        f"srun bash -c {shlex.quote('NANOTRAIN_NODE_RANK=$SLURM_NODEID exec ' + shlex.join(launcher))}",
        "code=$?",
        "if ((code == 75)); then # stopped by a signal, with the work saved",
        '  scontrol requeue "$SLURM_JOB_ID"',
        "fi",
        "exit $code",
    ]
    return "\n".join(lines) + "\n"
