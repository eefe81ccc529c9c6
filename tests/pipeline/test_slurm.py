import os
import shlex
import subprocess
from pathlib import Path

import pytest

from nanotrain.cli import main
from nanotrain.config.errors import MissingInputError, UserError
from nanotrain.pipeline.run import Pipeline
from nanotrain.pipeline.slurm import Job, build_jobs, submit
from tests.pipeline.fake_stages import FakeStages, build_report

RUN = Path("runs/toy")
CLUSTER = [
    "cluster=one_node",
    "cluster.nodes=4",
    "pretrain.cluster.time_limit=1-00:00:00",
    "pretrain.cluster.account=me",
]


def jobs_of(recipe, overrides=()) -> dict[str, str]:
    pending = Pipeline(recipe, FakeStages().table, build_report).check()
    return {job.entry: job.script for job in build_jobs(recipe, pending, list(overrides))}


def options(script: str) -> dict[str, str]:
    lines = [line.removeprefix("#SBATCH --") for line in script.splitlines() if line.startswith("#SBATCH")]
    return {name: value for name, _, value in (shlex.split(line)[0].partition("=") for line in lines)}


def fake_sbatch(folder: Path, monkeypatch, refuse: str = "") -> Path:
    """Put an sbatch on the PATH that notes its arguments and counts job ids from 100."""
    record = folder / "submitted"
    program = folder / "bin/sbatch"
    program.parent.mkdir()
    program.write_text(
        f'#!/bin/bash\nif [[ -n "{refuse}" && "$*" == *"{refuse}"* ]]; then echo "Invalid account" >&2; exit 1; fi\n'
        f'echo "$@" >>{record}\necho "$((99 + $(wc -l <{record})));cluster"\n'
    )
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")
    return record


def test_training_stages_take_the_cluster_and_the_others_one_rank(load):
    scripts = jobs_of(load("pipeline", *CLUSTER), CLUSTER)
    assert list(scripts) == ["prepare", "pretrain", "prune", "distill", "evaluate"]
    training, other = options(scripts["pretrain"]), options(scripts["prune"])
    assert (training["nodes"], training["ntasks-per-node"], training["gpus-per-node"]) == ("4", "8", "8")
    assert (other["nodes"], other["ntasks-per-node"], other["gpus-per-node"]) == ("1", "1", "1")
    assert (training["time"], options(scripts["distill"])["time"]) == ("1-00:00:00", "04:00:00")
    assert training["account"] == "me" and "account" not in other
    assert training["signal"] == "USR1@300" and "requeue" in training
    assert training["output"] == f"{RUN.absolute()}/slurm/pretrain-%j.log"


def test_cpu_jobs_ask_for_no_gpu(load):
    script = jobs_of(load("pipeline", "cluster=cpu", "cluster.ranks_per_node=2", "cluster.cpus_per_rank=4"))["distill"]
    assert options(script)["ntasks-per-node"] == "2" and options(script)["cpus-per-task"] == "4"
    assert "gpus-per-node" not in options(script)


def test_the_scripts_are_bash_and_keep_awkward_overrides_whole(load, tmp_path):
    overrides = [
        "seed=7",
        "output_dir=runs/to y",
        "pretrain.stage.model.hybrid_layer_pattern='M-M*'",
        "cluster.setup=['echo hi']",
    ]
    for script in jobs_of(load("pipeline", *overrides), overrides).values():
        assert subprocess.run(["bash", "-n"], input=script.encode(), check=False).returncode == 0
        assert "\necho hi\n" in script
        command = next(line for line in script.splitlines() if " -m nanotrain run " in line)
        words = shlex.split(command)
        assert words[-4:] == overrides and words[words.index("--only") + 1] in script
        assert options(script)["output"].startswith(str(Path("runs/to y").absolute()))


@pytest.mark.parametrize(
    ("code", "restarts", "requeued"),
    [(0, 0, False), (75, 0, True), (75, 9, True), (2, 0, False), (1, 0, True), (137, 2, True), (1, 3, False)],
)
def test_what_a_job_does_with_its_exit_code(load, tmp_path, code, restarts, requeued):
    script = jobs_of(load("pipeline"))["pretrain"]
    record = tmp_path / "scontrol-calls"
    stubs = f'srun() {{ return {code}; }}\nscontrol() {{ echo "$@" >>{record}; echo NodeAddr=10.0.0.1; }}\n'
    stubs += "SLURM_JOB_ID=42 SLURM_JOB_NODELIST=n1 SLURM_NTASKS=8\n"
    done = subprocess.run(
        ["bash"], input=stubs + script, text=True, env=os.environ | {"SLURM_RESTART_COUNT": str(restarts)}, check=False
    )
    assert done.returncode == code
    assert ("requeue 42" in record.read_text().splitlines()) is requeued


def test_jobs_are_chained_and_finished_entries_left_out(load, folder, monkeypatch):
    record = fake_sbatch(folder, monkeypatch)
    recipe = load("pipeline")
    Pipeline(recipe, FakeStages().table, build_report, only="prepare").run()
    pending = Pipeline(recipe, FakeStages().table, build_report).check()
    submitted = submit(recipe, build_jobs(recipe, pending, []))
    assert submitted == [("pretrain", "100"), ("prune", "101"), ("distill", "102"), ("evaluate", "103")]
    calls = record.read_text().splitlines()
    assert calls[0] == "--parsable runs/toy/slurm/pretrain.sbatch"
    assert calls[3] == "--parsable --dependency=afterok:102 --kill-on-invalid-dep=yes runs/toy/slurm/evaluate.sbatch"
    assert (RUN / "slurm/prune.sbatch").read_text() == jobs_of(recipe)["prune"]


def test_a_refused_job_names_what_was_submitted_before_it(load, folder, monkeypatch):
    fake_sbatch(folder, monkeypatch, refuse="prune.sbatch")
    recipe = load("pipeline")
    with pytest.raises(UserError, match=r"'prune' \(Invalid account\).*prepare \(100\), pretrain \(101\)"):
        submit(recipe, build_jobs(recipe, recipe.entries, []))


def test_without_slurm_one_sentence_and_nothing_written(load, folder, monkeypatch):
    monkeypatch.setenv("PATH", str(folder))
    with pytest.raises(MissingInputError, match="sbatch"):
        submit(load("pipeline"), [Job("prepare", "")])
    assert not RUN.exists()


def test_a_dry_run_prints_the_scripts_and_writes_nothing(folder, capsys):
    assert main(["submit", "family/pipeline.yaml", "cluster=cpu", "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert out.count("#!/bin/bash") == 5 and "--only distill -- " in out
    assert not Path("runs").exists()


def test_bad_settings_are_refused_before_anything_is_submitted(folder, capsys):
    assert main(["submit", "family/pipeline.yaml", "cluster.sbatch=['--dependency=singleton']"]) == 2
    assert "which the launcher sets itself" in capsys.readouterr().err
    assert main(["submit", "family/pipeline.yaml", "cluster.time_limit=soon"]) == 2
    assert "prepare.cluster.time_limit` (soon)" in capsys.readouterr().err


@pytest.mark.parametrize("words", [["--dry-run"], []])
def test_a_batch_that_the_clusters_ranks_cannot_share_is_refused_at_submission(folder, monkeypatch, capsys, words):
    record = fake_sbatch(folder, monkeypatch)
    cluster = ["cluster=cpu", "cluster.ranks_per_node=2", "distill.cluster.nodes=2"]
    assert main(["submit", "family/pipeline.yaml", *cluster, *words]) == 2
    err = capsys.readouterr().err
    assert "`distill.stage.training.global_batch_size` (2)" in err and "x 4 data-parallel ranks; set" in err
    assert not Path("runs").exists() and not record.exists()
    assert main(["submit", "family/pipeline.yaml", *cluster[:2], *words]) == 0


def test_a_layout_is_checked_against_the_cluster_not_this_machine(folder, capsys):
    words = ["submit", "family/pipeline.yaml", "engine.kind=megatron", "engine.megatron.pipeline_parallel=2"]
    assert main([*words, "cluster=cpu", "cluster.ranks_per_node=4", "--dry-run"]) == 0
    assert main([*words, "cluster=cpu", "cluster.ranks_per_node=3", "--dry-run"]) == 2
    assert "= 2 must divide the number of ranks (3)" in capsys.readouterr().err
