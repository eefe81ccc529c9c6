"""Start and samples/s of the loader against megatron-core's blended GPT dataset on the same shards: `python -m tests.benchmarks.bench_loader`.

60 sources of random documents, sequences of 8,192 tokens, one process and one thread on both sides. Every start is in a
process of its own; shards are in the page cache. Megatron's is given its cheapest settings (no attention mask, no resets).
"""

import argparse
import contextlib
import io
import json
import logging
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import types
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig

from nanotrain.config.data import PhaseConfig
from nanotrain.config.training import TrainingConfig
from nanotrain.data.loader import PretrainLoader
from nanotrain.data.token_shards import TokenShardWriter

SEQUENCE, BATCH, TIMED = 8192, 8, 400
FAR_STEP = 1_000_000


def write_shards(folder: Path, sources: int, tokens: int) -> None:
    for number in range(sources):
        draw = np.random.default_rng(number)
        lengths = draw.geometric(1 / 900, size=tokens // 900) + 1
        writer = TokenShardWriter(folder / f"s{number:02}", np.int32)
        writer.add_documents(draw.integers(3, 131072, lengths.sum()).astype(np.int32), lengths)
        writer.finish()


def blend(folder: Path) -> tuple[list[str], list[float]]:
    prefixes = sorted(str(file.with_suffix("")) for file in folder.glob("s*.bin"))
    weights = np.random.default_rng(1).dirichlet(np.ones(len(prefixes))).round(4) + 1e-4
    return prefixes, weights.tolist()


def ours(folder: Path, steps: int) -> dict[str, float]:
    prefixes, weights = blend(folder)
    names = [Path(prefix).name for prefix in prefixes]
    training = TrainingConfig(
        steps=max(steps, FAR_STEP + 1),
        global_batch_size=BATCH,
        micro_batch_size=BATCH,
        sequence_length=SEQUENCE,
        learning_rate=1e-3,
    )
    phases = [PhaseConfig(until=1.0, weights=dict(zip(names, weights, strict=True)))]
    start = time.perf_counter()
    sources = {name: [Path(prefix)] for name, prefix in zip(names, prefixes, strict=True)}
    loader = PretrainLoader.from_shards(sources, phases, training, 1)
    built = time.perf_counter()
    loader.microbatches(0)
    first = time.perf_counter()
    loader.microbatches(FAR_STEP)
    far = time.perf_counter()
    for step in range(1, 1 + TIMED // BATCH):
        loader.microbatches(step)
    end = time.perf_counter()
    return {
        "first_batch": first - start,
        "build": built - start,
        "resume": far - first,
        "samples": (TIMED // BATCH) * BATCH / (end - far),
    }


def theirs(folder: Path, steps: int, cache: Path) -> dict[str, float]:
    tokenizer = types.SimpleNamespace(vocab_size=131072, eod=2, pad=0, unique_identifiers={"name": "bench"})
    settings = {"reset_position_ids": False, "reset_attention_mask": False, "eod_mask_loss": False}
    config = GPTDatasetConfig(
        random_seed=1,
        sequence_length=SEQUENCE,
        blend=blend(folder),
        split="1,0,0",
        tokenizer=tokenizer,
        path_to_cache=str(cache),
        create_attention_mask=False,
        **settings,
    )
    start = time.perf_counter()
    dataset = BlendedMegatronDatasetBuilder(GPTDataset, [steps * BATCH, 0, 0], lambda: True, config).build()[0]
    built = time.perf_counter()

    def batch(step: int) -> dict[str, torch.Tensor]:
        return torch.utils.data.default_collate([dataset[k] for k in range(step * BATCH, (step + 1) * BATCH)])

    batch(0)
    first = time.perf_counter()
    for step in range(1, 1 + TIMED // BATCH):
        batch(step)
    return {
        "first_batch": first - start,
        "build": built - start,
        "samples": (TIMED // BATCH) * BATCH / (time.perf_counter() - first),
    }


def child(side: str, folder: Path, steps: int, cache: Path) -> None:
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    with contextlib.redirect_stdout(io.StringIO()):
        result = ours(folder, steps) if side == "ours" else theirs(folder, steps, cache)
    print(json.dumps(result))


def measure(side: str, folder: Path, steps: int, cache: Path) -> dict[str, float]:
    command = [sys.executable, "-W", "ignore", "-m", "tests.benchmarks.bench_loader", "--child", side]
    command += ["--folder", str(folder), "--steps", str(steps), "--cache", str(cache)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-2000:]
    return json.loads(result.stdout.strip().splitlines()[-1])


def shown(values: list[float], digits: int = 3) -> str:
    return f"{statistics.median(values):.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--child")
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--cache", type=Path)
    parser.add_argument("--steps", type=int, nargs="+", default=[1000, 100_000])
    parser.add_argument("--sources", type=int, default=60)
    parser.add_argument("--tokens", type=int, default=2_000_000)
    parser.add_argument("--repetitions", type=int, default=3)
    options = parser.parse_args()
    if options.child:
        child(options.child, options.folder, options.steps[0], options.cache)
        return
    print(f"megatron-core {version('megatron-core')} torch {version('torch')} numpy {version('numpy')}\n")
    print(
        "| steps of 8 | side | start to first batch, s | samples/s | resume at step 1,000,000, ms |\n|---|---|---|---|---|"
    )
    with tempfile.TemporaryDirectory() as scratch:
        folder, cache = Path(scratch), Path(scratch) / "cache"
        write_shards(folder, options.sources, options.tokens)
        for steps in options.steps:
            rows: dict[str, list[dict[str, float]]] = {
                "ours": [],
                "megatron, no index yet": [],
                "megatron, index cached": [],
            }
            for _ in range(options.repetitions):
                shutil.rmtree(cache, ignore_errors=True)
                rows["ours"].append(measure("ours", folder, steps, cache))
                rows["megatron, no index yet"].append(measure("theirs", folder, steps, cache))
                rows["megatron, index cached"].append(measure("theirs", folder, steps, cache))
            for name, results in rows.items():
                resume = shown([1000 * r["resume"] for r in results], 1) if name == "ours" else ""
                first = shown([r["first_batch"] for r in results])
                print(
                    f"| {steps:,} | {name} | {first} | {shown([r['samples'] for r in results], 0)} | {resume} |",
                    flush=True,
                )


if __name__ == "__main__":
    main()
