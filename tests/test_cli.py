import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from nanotrain import cli
from nanotrain.cli import EXIT_PREEMPTED, EXIT_USER_ERROR, _flags_first, main
from nanotrain.runtime.signals import Preempted
from tests.pipeline.conftest import write_family
from tests.pipeline.fake_stages import FakeStages, build_report

COMMANDS = ([], ["run"], ["plan"], ["report"], ["chat"], ["export"])
HELP_NEEDS = "import argparse, contextlib, dataclasses, json, logging, pathlib, shutil, signal, subprocess"
RUN_NEEDS = "import hydra.core.override_parser.overrides_parser, hydra._internal.config_loader_impl, omegaconf"


@pytest.fixture
def fakes(tmp_path, monkeypatch) -> FakeStages:
    """A working directory with the toy family, and a command line with fake stages."""
    write_family(tmp_path)
    monkeypatch.chdir(tmp_path)
    stages = FakeStages()
    monkeypatch.setattr(cli, "_stages", stages.table)
    monkeypatch.setattr(cli, "_build_report", build_report)
    return stages


def cpu_seconds(command: list[str]) -> tuple[float, str, str]:
    """Run a command; return the processor time it took, stdout and stderr."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime, done.stdout, done.stderr


def times_as_long(command: list[str], libraries: str, rounds: int = 3) -> float:
    """Return the processor time of a command over that of importing the libraries it cannot do without.

    Load lengthens processor time too (a busy sibling thread, cold caches), but that of both: they take turns, and the
    shortest of each counts.
    """
    turns = [(cpu_seconds(command)[0], cpu_seconds([sys.executable, "-c", libraries])[0]) for _ in range(rounds)]
    return min(own for own, _ in turns) / min(yardstick for _, yardstick in turns)


def sentence(capsys) -> str:
    """Return the one line that a user error prints."""
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("nanotrain: ")]
    assert len(lines) == 1
    return lines[0]


@pytest.mark.parametrize("command", COMMANDS, ids=lambda words: " ".join(words) or "nanotrain")
def test_help_comes_in_a_blink_and_imports_nothing_heavy(command):
    words = [*command, "--help"]
    _, out, err = cpu_seconds([sys.executable, "-X", "importtime", "-m", "nanotrain", *words])
    imported = {line.rsplit("|", 1)[-1].strip() for line in err.splitlines()}
    assert not imported & {"torch", "hydra", "omegaconf", "transformers", "numpy", "yaml", "tqdm"}
    assert "usage: nanotrain" in out
    assert times_as_long([sys.executable, "-m", "nanotrain", *words], HELP_NEEDS) < 2


def test_a_run_prints_its_report_and_a_second_one_does_nothing(fakes, capsys):
    assert main(["run", "family/pipeline.yaml"]) == 0
    assert capsys.readouterr().out.strip() == "runs/toy/report.html"
    assert fakes.calls == ["prepare", "pretrain", "prune", "distill", "evaluate"]
    assert main(["run", "family/pipeline.yaml"]) == 0
    assert len(fakes.calls) == 5


def test_a_finished_run_is_quick_and_never_imports_pytorch(fakes):
    assert main(["run", "family/pipeline.yaml"]) == 0
    code = (
        "import sys; from nanotrain.cli import main; code = main(['run', 'family/pipeline.yaml']);"
        "assert code == 0 and not {'torch', 'transformers'} & set(sys.modules)"
    )
    assert times_as_long([sys.executable, "-c", code], RUN_NEEDS) < 7  # 4.6; importing torch adds 9


BAD = [
    (["run", "family/nothing.yaml"], "is not a recipe file"),
    (["run", "family/pipeline.yaml", "pretrain.stage.training.stepz=1"], "did you mean 'steps'"),
    (["run", "family/pipeline.yaml", "pretrain.stage.training.steps=no"], "must be a whole number"),
    (["run", "family/pipeline.yaml", "pretrain.stage.model.n_groups=3"], "must be divisible by"),
    (["run", "family/pipeline.yaml", "pretrain.stage.training.schedule.min_learning_rate=9"], "min_learning_rate"),
    (["run", "family/pipeline.yaml", "distill.stage.teacher_from=pretrian"], "did you mean 'pretrain'"),
    (["run", "family/pipeline.yaml", "pretrain.stage.model.vocab_size=100"], "vocabulary of 100"),
    (["run", "family/distill.yaml"], "no finished entry in runs/toy leaves a checkpoint"),
    (["run", "family/pipeline.yaml", "--force", "pretrian"], "did you mean 'pretrain'"),
    (["run", "family/pipeline.yaml", "--multirun"], "needs an override that sweeps"),
    (["run", "family/pipeline.yaml", "seed=1,2"], "add --multirun"),
    (["run", "family/pipeline.yaml", "--multirun", "seed=1,two"], "`seed`"),
    (["run", "family/pipeline.yaml", "output_dir=family/prune.yaml"], "is a file"),
    (["run", "family/pipeline.yaml", "output_dir=family"], "was not made by a run"),
    (["chat", "nowhere", "--no-think", "--thinking-budget", "3"], "exclude each other"),
]


@pytest.mark.parametrize(("command", "fragment"), BAD, ids=[" ".join(row[0][1:]) for row in BAD])
def test_a_users_mistake_is_one_sentence_exit_code_2_and_nothing_written(fakes, capsys, command, fragment):
    before = {path: path.stat().st_mtime_ns for path in Path().rglob("*")}
    assert main(command) == EXIT_USER_ERROR
    assert fragment in sentence(capsys)
    assert {path: path.stat().st_mtime_ns for path in Path().rglob("*")} == before
    assert fakes.calls == []


def test_a_mistake_on_the_real_command_line_has_no_traceback(tmp_path):
    command = [sys.executable, "-m", "nanotrain", "run", "recipes/quickstart/pipeline.yaml", "sead=1"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and done.stdout == ""
    assert len(done.stderr.splitlines()) == 1 and "did you mean 'seed'" in done.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "words", [["train"], ["run"], ["run", "x.yaml", "--fast"], ["chat", "x", "--thinking-budget", "-1"]]
)
def test_argparse_mistakes_are_exit_code_2(words, capsys):
    with pytest.raises(SystemExit) as caught:
        main(words)
    assert caught.value.code == 2
    assert "usage: nanotrain" in capsys.readouterr().err


def test_our_own_defects_keep_their_traceback(fakes, monkeypatch):
    def broken(config, run):
        raise ZeroDivisionError

    monkeypatch.setattr(cli, "_stages", lambda: dict.fromkeys(fakes.table(), broken))
    with pytest.raises(ZeroDivisionError):
        main(["run", "family/pipeline.yaml"])


@pytest.mark.parametrize("how", ["SIGTERM", "SIGUSR1", "SIGINT", "Preempted"])
def test_a_stopped_run_ends_with_75_and_the_same_command_finishes_it(fakes, monkeypatch, capsys, how):
    def stopping(config, run):
        if run.entry == "prune":
            if how == "Preempted":
                raise Preempted("SIGTERM", 3)
            os.kill(os.getpid(), signal.Signals[how])
            time.sleep(1)
        return fakes._stage(config, run)

    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell lets what it starts in the background ignore it
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)]
    monkeypatch.setattr(cli, "_stages", lambda: dict.fromkeys(fakes.table(), stopping))
    assert main(["run", "family/pipeline.yaml"]) == EXIT_PREEMPTED
    assert "saved" in sentence(capsys)
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)] == before
    monkeypatch.setattr(cli, "_stages", fakes.table)
    assert main(["run", "family/pipeline.yaml"]) == 0
    assert fakes.calls == ["prepare", "pretrain", "prune", "distill", "evaluate"]


def test_cfg_prints_the_composed_recipe_and_runs_nothing(fakes, capsys):
    assert main(["run", "family/pipeline.yaml", "--cfg", "pretrain.stage.training.steps=9", "engine.threads=1"]) == 0
    text = capsys.readouterr().out
    assert "pretrain:" in text and "steps: 9" in text and "threads: 1" in text
    assert main(["run", "--cfg", "family/distill.yaml"]) == 0
    assert "teacher_from: pretrain" in capsys.readouterr().out
    assert fakes.calls == [] and not Path("runs").exists()


def test_multirun_makes_one_run_each_in_turn(fakes, capsys):
    assert main(["run", "family/prepare.yaml", "-m", "seed=1,2", "stage.corpus.num_chat_rows=range(3,5)"]) == 0
    folders = sorted(path.name for path in Path("runs").iterdir())
    assert folders == [f"toy-seed-{seed}-num_chat_rows-{rows}" for seed in (1, 2) for rows in (3, 4)]
    assert capsys.readouterr().out.splitlines() == [f"runs/{name}/report.html" for name in folders]
    assert main(["run", "family/prepare.yaml", "-m", "seed=2,3", "stage.corpus.num_chat_rows=range(3,5)"]) == 0
    assert len(fakes.calls) == 6  # the two points that both sweeps share are not run again
    assert main(["run", "family/prepare.yaml", "-m", "seed=1,2", "output_dir=other/here", "--cfg"]) == 0
    assert "output_dir: other/here-seed-2" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "recipe", "overrides", "force"),
    [
        (["r.yaml", "a=1"], "r.yaml", ["a=1"], None),
        (["a.yaml", "--force", "a=1"], "a.yaml", ["a=1"], ""),
        (["a.yaml", "--force", "prune", "a=1"], "a.yaml", ["a=1"], "prune"),
        (["a.yaml", "a=1", "--force=prune", "b=2"], "a.yaml", ["a=1", "b=2"], "prune"),
        (["--force", "r.yaml", "~a"], "r.yaml", ["~a"], ""),
        (["--cfg", "r.yaml", "+a=1", "--force", "-m", "b=1,2"], "r.yaml", ["+a=1", "b=1,2"], ""),
        (["r.yaml", "a=1", "--force"], "r.yaml", ["a=1"], ""),
        (["r.yaml", "--", "a=-1", "-b=2"], "r.yaml", ["a=-1", "-b=2"], None),
    ],
)
def test_flags_and_overrides_mix_in_any_order(words, recipe, overrides, force):
    options = cli._parser().parse_args(_flags_first(["run", *words]))
    assert (options.recipe, options.overrides, options.force) == (recipe, overrides, force)


def test_force_reaches_the_pipeline(fakes, capsys):
    assert main(["run", "family/prepare.yaml"]) == 0
    assert main(["run", "family/prepare.yaml", "seed=2"]) == EXIT_USER_ERROR
    assert "--force prepare" in sentence(capsys)
    assert main(["run", "family/prepare.yaml", "seed=2", "--force"]) == 0
    assert main(["run", "--force", "prepare", "family/prepare.yaml", "seed=2"]) == 0
    assert fakes.calls == ["prepare"] * 3


@pytest.mark.parametrize("words", [["--ranks", "2"], ["--ranks=2"]])
def test_plan_prints_a_layout_and_runs_nothing(fakes, capsys, words):
    recipe, overrides = "family/pretrain.yaml", ["engine.kind=megatron", "engine.megatron.pipeline_parallel=2"]
    assert main(["plan", recipe, *words, *overrides]) == 0
    assert "layout   2 ranks = tensor 1 x pipeline 2 x context 1 x data 1; 2 micro-batches" in capsys.readouterr().out
    assert main(["plan", recipe, *overrides, "--ranks", "3"]) == EXIT_USER_ERROR
    assert "must divide the number of ranks (3)" in sentence(capsys)
    assert not Path("runs").exists()
