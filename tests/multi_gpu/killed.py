"""The command line on N ranks under launch/torchrun.sh: a rank is killed, and the run goes on, also on fewer ranks.

Made-up text, a tiny model in plain torch: what is looked at is the run and not the kernels. A machine that only has the
checkout lacks the package's metadata and what the data stages import; `stand_ins` lies on PYTHONPATH for the one and
the other.
"""

import json
import os
import random
import shutil
import subprocess
import sys
import time
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from nanotrain.checkpoint.resume import list_states
from nanotrain.config.engine import KernelsConfig
from nanotrain.data.manifest import write_manifest
from nanotrain.data.token_shards import TokenShardWriter
from nanotrain.data.tokenizer import NUM_SPECIALS, build_tokenizer, read_tekken, save_tokenizer
from nanotrain.runtime.files import file_digest
from tests.data.fake_packages import byte_tekken
from tests.multi_gpu.shapes import patience
from tests.multi_gpu.starts import OF_A_LAUNCHER, end

ROOT = Path(__file__).parents[2]
SOURCES = ("web", "code", "math", "multilingual", "sft")
STEPS, SAVE_SECONDS = 150, 0.5
LONGEST_SECONDS = 75.0
"""Of one command on GPUs."""
LONGEST_END_SECONDS = 60.0
"""From the death of one rank to the end of all."""
LOSSES_AGREE = 5e-3
"""Relative; of each step, where a sum has another order on fewer ranks, and bf16 products on a GPU."""
_MODEL = ["hybrid_layer_pattern='M-M*-M-'", "vocab_size=1280", "hidden_size=32", "intermediate_size=64", "head_dim=8"]
_MODEL += ["mamba_num_heads=4", "mamba_head_dim=8", "ssm_state_size=8"]
_TRAINING = [f"steps={STEPS}", "global_batch_size=8", "micro_batch_size=1", "sequence_length=64", "keep_last=2"]
_TRAINING += [f"save_interval_seconds={SAVE_SECONDS}", "evaluation_interval=0", "evaluation_tokens=200"]
_TRAINING += ["schedule.warmup_steps=5", "schedule.decay_steps=20"]
_STAND_IN = """# This package is not installed; only what prepares data uses it.
class {name}:
    def __init__(self, *_arguments, **_options):
        raise ModuleNotFoundError("{package} is not installed")
"""
_OF_REASONING_GYM = {
    "factory": "create_dataset",
    "arithmetic/gsm_symbolic/gsm_symbolic": "GSMSymbolicDataset GSMSymbolicDatasetConfig",
}


def make_data(folder: Path) -> Path:
    """Write a data folder: random tokens in documents of all sources, and a byte tokenizer."""
    pattern, tokens = read_tekken(byte_tekken(), 280)
    save_tokenizer(build_tokenizer(pattern, tokens), folder / "tokenizer")
    draw, names = random.Random(1), []
    for source in SOURCES:
        for split, documents in (("train", 200), ("validation", 20)):
            writer = TokenShardWriter(folder / source / split, np.uint16)
            for _ in range(documents):
                writer.add_document([NUM_SPECIALS + draw.randrange(256) for _ in range(draw.randrange(20, 200))])
            writer.finish()
            names += [f"{source}/{split}.bin", f"{source}/{split}.idx"]
    digest = file_digest(folder / "tokenizer/tokenizer.json")
    write_manifest(folder, {"tokenizer_digest": digest, "vocab_size": NUM_SPECIALS + len(tokens)}, names)
    return folder


def stand_ins(folder: Path) -> list[str]:
    """Write what the command line needs beside torch and is not installed; return the names."""
    made = []
    try:
        version("nanotrain")
    except PackageNotFoundError:
        project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
        own = folder / f"nanotrain-{project['version']}.dist-info"
        own.mkdir(parents=True)
        (own / "METADATA").write_text(f"Metadata-Version: 2.1\nName: nanotrain\nVersion: {project['version']}\n")
        made.append("metadata of nanotrain")
    if find_spec("reasoning_gym") is None:
        for package in ("", "/arithmetic", "/arithmetic/gsm_symbolic"):
            place = folder / f"reasoning_gym{package}"
            place.mkdir(parents=True, exist_ok=True)
            (place / "__init__.py").write_text("")
        for module, names in _OF_REASONING_GYM.items():
            text = "\n\n".join(_STAND_IN.format(name=name, package="reasoning_gym") for name in names.split())
            (folder / f"reasoning_gym/{module}.py").write_text(text)
        made.append("reasoning_gym")
    return made


@dataclass(frozen=True)
class CommandLine:
    """`nanotrain run` of a small pretraining under launch/torchrun.sh."""

    data: Path
    site: Path
    engine: Sequence[str]
    longest: float
    """Seconds of one command."""

    def start(self, output: Path, size: int, restarts: int) -> "subprocess.Popen[str]":
        """Start the launcher; what it and the ranks say goes to a file beside the output folder."""
        words = [f"stage.model.{text}" for text in _MODEL] + [f"stage.training.{text}" for text in _TRAINING]
        words += [*self.engine, f"stage.data_from='{self.data}'", f"output_dir='{output}'", "name=faults"]
        recipe = ROOT / "recipes/quickstart/pretrain.yaml"
        launcher = ["bash", str(ROOT / "launch/torchrun.sh"), "--ranks", str(size), "--restarts", str(restarts)]
        kept = {name: value for name, value in os.environ.items() if name not in OF_A_LAUNCHER}
        paths = [str(self.site), str(ROOT), *os.environ.get("PYTHONPATH", "").split(":")]
        kept |= {"PYTHON": sys.executable, "PYTHONPATH": ":".join(path for path in paths if path)}
        with output.with_suffix(".log").open("a", encoding="utf-8") as log:
            return subprocess.Popen(
                [*launcher, str(recipe), *words], cwd=ROOT, env=kept, stdout=log, stderr=log, text=True
            )

    def run(self, output: Path, size: int) -> float:
        """Bring a run to its end and return its wall clock in seconds."""
        started = time.monotonic()
        process = self.start(output, size, restarts=0)
        try:
            code = process.wait(self.longest)
        finally:
            end(process)
        assert code == 0, f"exit code {code}: {said(output)}"
        return time.monotonic() - started


def engine_words(size: int, *, cpu: bool) -> list[str]:
    """Return the overrides of the engine: FSDP2 where half of the ranks are still several, replicas otherwise."""
    kind = "torch_fsdp2" if size > 2 else "torch_ddp"
    words = [f"engine={kind}", "engine.data_parallel=auto"] if size <= 2 else [f"engine={kind}"]
    words += ["engine.device=cpu", "engine.precision=fp32", "engine.threads=1"] if cpu else ["engine.precision=bf16"]
    return words + [f"engine.kernels.{op}=torch" for op in KernelsConfig().choices()]


def said(output: Path) -> str:
    """Return the end of what a run's ranks said."""
    file = output.with_suffix(".log")
    return file.read_text(encoding="utf-8", errors="replace")[-1500:] if file.exists() else "nothing was said"


def ranks_of(launcher: int) -> dict[int, psutil.Process]:
    """Return rank -> process of those that a launcher runs now."""
    found = {}
    for child in psutil.Process(launcher).children(recursive=True):
        try:
            if "nanotrain.runtime.rank_process" in child.cmdline():
                found[int(child.environ()["RANK"])] = child
        except (psutil.NoSuchProcess, psutil.ZombieProcess, KeyError):
            continue
    return found


def kill_one(process: "subprocess.Popen[str]", output: Path, size: int, longest: float) -> dict[str, Any]:
    """Kill the last rank once there is a state of a third of the steps, and wait for the end of all of them."""
    states = output / "pretrain/state"
    deadline = time.monotonic() + longest
    while not any(step >= STEPS // 3 for step, _ in list_states(states)):
        assert process.poll() is None and time.monotonic() < deadline, f"no such state was saved: {said(output)}"
        time.sleep(0.02)
    ranks = ranks_of(process.pid)
    assert len(ranks) == size, f"{len(ranks)} ranks of {size} run: {said(output)}"
    ranks[size - 1].kill()
    started = time.monotonic()
    psutil.wait_procs(list(ranks.values()), timeout=LONGEST_END_SECONDS)
    alive = [rank for rank, one in ranks.items() if one.is_running() and one.status() != psutil.STATUS_ZOMBIE]
    newest = list_states(states)[-1][0]
    assert newest < STEPS, "the run was over before a rank could be killed"
    return {"killed_rank": size - 1, "newest_state": newest, "still_alive": alive,
            "all_ended_after_seconds": round(time.monotonic() - started, 2)}  # fmt: skip


def losses_of(output: Path) -> dict[int, float]:
    """Return step -> loss of a run."""
    lines = (output / "pretrain/metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return {line["step"]: line["loss"] for line in map(json.loads, lines)}


def weights_of(output: Path) -> dict[str, str]:
    """Return file -> sha256 of the product's weights."""
    return {file.name: file_digest(file) for file in sorted((output / "pretrain/hf").glob("*.safetensors"))}


def compare(output: Path, calm: Path) -> dict[str, Any]:
    """Return how a run's losses and weights differ from those of the undisturbed one."""
    losses, expected = losses_of(output), losses_of(calm)
    assert losses.keys() == expected.keys() and len(losses) == STEPS, f"{len(losses)} steps were logged of {STEPS}"
    largest = max(abs(losses[step] - expected[step]) / expected[step] for step in expected)
    return {"largest_loss_difference": float(f"{largest:.3g}"), "same_bytes": weights_of(output) == weights_of(calm)}


class Kills:
    """The cases, in a folder of their own; `undisturbed` comes first."""

    def __init__(self, folder: Path, size: int, *, cpu: bool) -> None:
        self._folder, self._size, self._cpu = folder, size, cpu
        site = folder / "site"
        self._stand_ins = stand_ins(site)
        self._command = CommandLine(
            make_data(folder / "data"), site, engine_words(size, cpu=cpu), LONGEST_SECONDS * patience(cpu=cpu)
        )

    def undisturbed(self) -> dict[str, Any]:
        seconds = self._command.run(self._folder / "calm", self._size)
        losses = losses_of(self._folder / "calm")
        return {
            "ranks": self._size,
            "engine": self._command.engine[0],
            "steps": len(losses),
            "first_loss": losses[1],
            "last_loss": losses[STEPS],
            "run_seconds": round(seconds, 2),
            "stand_ins": self._stand_ins,
            "passed": losses[STEPS] < losses[1],
        }

    def killed(self) -> dict[str, Any]:
        """Kill a rank; the launcher starts all of them again. The folder as it was in between is kept for `fewer`."""
        output = self._folder / "killed"
        process = self._command.start(output, self._size, restarts=1)
        try:
            row = kill_one(process, output, self._size, self._command.longest)
            shutil.copytree(output, self._folder / "fewer")  # the new ranks import for seconds before they write
            started = time.monotonic()
            code = process.wait(self._command.longest)
        finally:
            end(process)
        assert code == 0, f"exit code {code}: {said(output)}"
        row |= {"ranks": self._size, "goes_on_for_seconds": round(time.monotonic() - started, 2)}
        row |= compare(output, self._folder / "calm")
        named = f"rank {self._size - 1} was killed by SIGKILL" in output.with_suffix(".log").read_text(encoding="utf-8")
        near = row["same_bytes"] if self._cpu else row["largest_loss_difference"] <= LOSSES_AGREE
        return row | {"named": named, "passed": named and not row["still_alive"] and near}

    def fewer(self) -> dict[str, Any]:
        """Go on with what the kill left on half of the ranks."""
        output, size = self._folder / "fewer", self._size // 2
        newest = list_states(output / "pretrain/state")[-1][0]
        seconds = self._command.run(output, size)
        row = {"ranks": size, "saved_on_ranks": self._size, "newest_state": newest, "run_seconds": round(seconds, 2)}
        row |= compare(output, self._folder / "calm")
        return row | {"passed": row["largest_loss_difference"] <= LOSSES_AGREE}
