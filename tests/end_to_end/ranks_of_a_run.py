"""Runs the command line on several CPU ranks for tests that kill them; started ranks come out of a warm process.

The whole pipeline at the smallest size, on made-up text in the layout of the real packages.
"""

import contextlib
import faulthandler
import importlib.util
import json
import multiprocessing
import os
import signal
import socket
import sys
import time
import traceback
import uuid
from contextlib import ExitStack
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import psutil

from nanotrain.cli import main
from nanotrain.data import corpus
from nanotrain.runtime.files import file_digest, folder_digest
from nanotrain.runtime.rank_process import end_with
from tests import megatron_cpu
from tests.end_to_end.rank_engines import ENGINES, RankEngine
from tests.end_to_end.shortened import without_clocks

ROOT = Path(__file__).parents[2]
RECIPE = str(ROOT / "recipes/quickstart/pipeline.yaml")
MARK = "NANOTRAIN_TEST_RANKS"
"""Environment variable that the processes of one attempt share; a rank has set it itself, so only its children show it."""
TRAINED = ("pretrain", "distill", "sft")
_TRAINING = ["global_batch_size=4", "micro_batch_size=1", "sequence_length=64", "evaluation_interval=0"]
_TRAINING += ["schedule.warmup_steps=1", "schedule.decay_steps=1", "evaluation_tokens=200", "keep_last=2"]
_MODEL = ["hybrid_layer_pattern='M-M*-M-'", "vocab_size=1280", "hidden_size=32", "intermediate_size=64", "head_dim=8"]
_MODEL += ["mamba_num_heads=4", "mamba_head_dim=8", "ssm_state_size=8"]
_PRUNE = ["calibration_samples=4", "calibration_sequence_length=32", "search.num_layers=[5]", "search.hidden_size=[24]"]
_PRUNE += ["search.intermediate_size=[48]", "search.mamba_num_heads=[4]", "search.max_parameters_fraction=1.0"]
_EVALUATE = ["num_prompts=2", "max_new_tokens=6", "sequence_length=64", "max_validation_tokens=500"]
_EVALUATE += ["thinking_budgets=[2]", "thinking_grace=2"]
_CORPUS = ["vocab_size=1280", "validation_fraction=0.15", "num_chat_rows=60", "num_chat_validation_rows=20"]
_SETTINGS = [
    *(f"prepare.stage.corpus.{value}" for value in _CORPUS),
    *(f"pretrain.stage.model.{value}" for value in _MODEL),
    *(f"{entry}.stage.training.{value}" for entry in TRAINED for value in _TRAINING),
    "sft.stage.training.sequence_length=512",
    *(f"prune.stage.{value}" for value in _PRUNE),
    *(f"evaluate.stage.{value}" for value in _EVALUATE),
]


def write_short_pipeline(folder: Path) -> str:
    """Write a pipeline of three of the stages (prepare, pretrain, export) and return its file."""
    entries = "".join(
        f"  - {{name: {name}, recipe: {ROOT / 'recipes/quickstart' / name}.yaml}}\n"
        for name in ("prepare", "pretrain", "export")
    )
    file = folder / "short.yaml"
    file.write_text(f"name: quickstart\nseed: 1\npipeline:\n{entries}")
    return str(file)


def short_settings(steps: int, engine: RankEngine = ENGINES["ddp"]) -> list[str]:
    """Return the overrides of the short pipeline; a state is saved as often as the writing allows."""
    kept = [
        text
        for text in settings(steps, 1e-6, engine)
        if text.split(".")[0] not in ("prune", "distill", "sft", "evaluate")
    ]
    return [*kept, "export.stage.init_from=pretrain"]


def settings(steps: int, save_seconds: float, engine: RankEngine = ENGINES["ddp"]) -> list[str]:
    """Return the overrides of the smallest pipeline with `steps` steps a training stage."""
    lengths = [f"{entry}.stage.training.steps={steps}" for entry in TRAINED]
    return [
        *engine.overrides,
        *_SETTINGS,
        *lengths,
        *(f"{entry}.stage.training.save_interval_seconds={save_seconds}" for entry in TRAINED),
    ]


# With what the stages and torch's parallel wrappers import late, or each of hundreds of processes would do it again.
_PRELOADED = ["tests.end_to_end.ranks_of_a_run", "nanotrain.stages", "nanotrain.pipeline.run", "torch._dynamo"]
_PRELOADED += ["nanotrain.pipeline.resume_check", "torch.distributed.fsdp", "torch.distributed.tensor", "wandb"]
_PRELOADED += ["transformers.models.nemotron_h.modeling_nemotron_h", "nanotrain.report.build"]
_PRELOADED += [*ENGINES["ddp"].imports]
_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(_PRELOADED)


def preload(engine: RankEngine) -> None:
    """Have the ranks come out of a process that has this engine's library too; only before the first of them."""
    _context.set_forkserver_preload([*_PRELOADED, *engine.imports])


def warm_up() -> None:
    """Start the process that the ranks come out of; it imports everything."""
    process = _context.Process(target=free_port)
    process.start()
    process.join()


def make_wheels(folder: Path) -> dict[str, Path]:
    """Write the made-up packages of the corpus."""
    spec = importlib.util.spec_from_file_location("fakes", ROOT / "tests/data/fake_packages.py")
    assert spec is not None and spec.loader is not None
    fakes = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(fakes)
    return fakes.make_wheels(folder, fakes.byte_tekken())


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Ranks:
    """The processes of one attempt at a run."""

    def __init__(
        self, arguments: list[str], size: int, wheels: dict[str, Path], logs: Path, *, megatron: bool = False
    ) -> None:
        logs.mkdir(parents=True, exist_ok=True)
        port = str(free_port())
        self._mark = uuid.uuid4().hex
        self._files = [logs / f"rank-{rank}.log" for rank in range(size)]
        self.processes: list[BaseProcess] = []
        for rank, file in enumerate(self._files):
            environment = {"OMP_NUM_THREADS": "1", MARK: self._mark}
            if size > 1:
                environment |= {"RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_RANK": str(rank)}
                environment |= {"LOCAL_WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            process = _context.Process(target=_rank, args=(arguments, environment, wheels, file, megatron))
            process.start()
            self.processes.append(process)

    def signal(self, number: signal.Signals, rank: int | None = None) -> None:
        """Send a signal to one rank, or to all of them."""
        for process in self.processes if rank is None else [self.processes[rank]]:
            assert process.pid is not None
            if process.is_alive():
                os.kill(process.pid, number)

    def wait(self, seconds: float) -> list[int] | None:
        """Return the exit codes, or None where a rank still runs after so long."""
        deadline = time.monotonic() + seconds
        for process in self.processes:
            process.join(max(0.0, deadline - time.monotonic()))
        codes = [process.exitcode for process in self.processes]
        return None if None in codes else [code for code in codes if code is not None]

    def any_ended(self) -> bool:
        """Whether some rank has come to its end."""
        return any(not process.is_alive() for process in self.processes)

    def print_stacks(self) -> None:
        """Have each rank that still runs write the stacks of its threads to its log."""
        self.signal(signal.SIGUSR2)
        time.sleep(2)

    def processes_left(self) -> list[psutil.Process]:
        """Return what the ranks started and left behind."""
        return [one for one in psutil.process_iter() if self._mark in _variable(one, MARK)]

    def kill(self) -> None:
        """Leave none behind."""
        for process in self.processes:
            process.kill()
            process.join()

    @property
    def output(self) -> str:
        """What the ranks wrote, one after the other."""
        return "\n".join(file.read_text(encoding="utf-8", errors="replace") for file in self._files if file.exists())


def _variable(process: psutil.Process, name: str) -> str:
    with contextlib.suppress(psutil.Error):  # it has ended meanwhile
        return process.environ().get(name, "")
    return ""


def _rank(
    arguments: list[str], environment: dict[str, str], wheels: dict[str, Path], file: Path, megatron: bool
) -> None:
    import torch

    end_with(os.getppid())
    os.environ |= environment
    os.chdir(ROOT)
    torch.set_num_threads(1)
    with ExitStack() as stack:
        log = stack.enter_context(file.open("w", buffering=1, encoding="utf-8"))
        os.dup2(log.fileno(), 1), os.dup2(log.fileno(), 2)
        sys.stdout = sys.stderr = sys.__stderr__ = log
        faulthandler.register(signal.SIGUSR2, log, all_threads=True)
        if megatron:
            megatron_cpu.install()
        corpus.ensure_wheels = lambda packages, target: wheels
        signal.signal(signal.SIGINT, signal.default_int_handler)
        try:
            code = main(arguments)
        except BaseException:
            traceback.print_exc(file=log)  # here, because the log closes before this process says it itself
            raise
        log.flush()
    os._exit(code)  # a fork: exit handlers and threads of libraries are its parent's


def digest_of_run(folder: Path) -> dict[str, Any]:
    """Return what two equal runs have in common: digests of weights and data, numbers of the report."""
    report = without_clocks(json.loads((folder / "report.json").read_text(encoding="utf-8")))
    weights = sorted(folder.glob("*/hf/*.safetensors"))
    return {
        "weights": {file.relative_to(folder).as_posix(): file_digest(file) for file in weights},
        "data": folder_digest(folder / "prepare/data"),
        "report": report["stages"],
    }
