"""Every number of the report, as plain values: the content of report.json and the source of the page."""

import importlib.metadata
import math
import platform
from typing import Any

from nanotrain.report.charts import thin
from nanotrain.report.published import compare_with_published
from nanotrain.report.run_folder import EntryRecord, RunRecord

TRAINING_STAGES = ("PretrainConfig", "DistillConfig", "SftConfig")
PACKAGES = ("nanotrain", "torch", "transformers", "tokenizers", "safetensors", "numpy", "hydra-core")

_BOOKKEEPING = ("step", "tokens", "seconds", "eta_seconds")


def collect_numbers(run: RunRecord) -> dict[str, Any]:
    """Return the numbers of a run; every value is JSON, and what is not finite is null."""
    finished = [entry.is_finished for entry in run.entries]
    numbers = {
        "name": run.name,
        "complete": bool(finished) and all(finished),
        "total_seconds": sum(entry.seconds for entry in run.entries),
        "peak_memory_bytes": max((entry.peak_memory_bytes for entry in run.entries), default=0),
        "stages": {entry.name: _stage_numbers(entry) for entry in run.entries},
        "quality": quality_rows(run),
        "plan_and_actual": [_plan_row(entry) for entry in run.by_stage(*TRAINING_STAGES)],
        "published": compare_with_published(run),
        "versions": versions(),
    }
    return finite(numbers)


def finite(value: Any) -> Any:
    """Return `value` with NaN and infinities, which JSON does not know, replaced by None."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(key): finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
    return value


def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that computed the numbers, as installed."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


def _stage_numbers(entry: EntryRecord) -> dict[str, Any]:
    record = entry.record
    return {
        "stage": entry.stage.removesuffix("Config").lower(),
        "finished": entry.is_finished,
        "seconds": entry.seconds,
        "peak_memory_bytes": entry.peak_memory_bytes,
        "seed": entry.recipe.get("seed", None),
        "kind": record["kind"] if record else None,
        "product": record["product"] if record else None,
        "product_digest": record["product_digest"] if record else None,
        "inputs": record["inputs"] if record else {},
        "package_version": record["package_version"] if record else None,
        "results": entry.results,
        "sources": entry.manifest.get("sources", []),
        "curves": curves(entry),
    }


def curves(entry: EntryRecord) -> dict[str, list[tuple[float, float]]]:
    """Return (step, value) points of every numeric metric that was logged, at most a few hundred each."""
    names = sorted({name for line in entry.metrics for name in line} - set(_BOOKKEEPING))
    found = {}
    for name in names:
        points = [
            (float(line["step"]), float(line[name]))
            for line in entry.metrics
            if isinstance(line.get(name), (int, float)) and not isinstance(line[name], bool)
        ]
        kept = thin(points)
        if kept:
            found[name] = kept
    return found


def quality_rows(run: RunRecord) -> list[dict[str, Any]]:
    """Return one row a checkpoint of the run: its size, the tokens that trained it, its held-out quality."""
    rows = []
    for entry in run.by_stage("PruneConfig", *TRAINING_STAGES):
        results = entry.results
        after = "held_out_after" in results
        held_out = results["held_out_after"] if after else results.get("held_out")
        if not held_out:
            continue
        rows.append(
            {
                "entry": entry.name,
                "stage": entry.stage.removesuffix("Config").lower(),
                "parameters": results["parameters_after"] if after else results["parameters"],
                "tokens": 0 if after else results["tokens"],
                **held_out,
            }
        )
    return rows


def _plan_row(entry: EntryRecord) -> dict[str, Any]:
    results = entry.results
    training = entry.recipe["stage"]["training"] if entry.recipe else {}
    speed = [line["tokens_per_second"] for line in entry.metrics if "tokens_per_second" in line]
    return {
        "entry": entry.name,
        "planned_steps": training["steps"] if training else None,
        "steps": results["steps"],
        "planned_tokens": results["planned_tokens"],
        "tokens": results["tokens"],
        "skipped_steps": results["skipped_steps"],
        "seconds": entry.seconds,
        "tokens_per_second": sorted(speed)[len(speed) // 2] if speed else None,
        "final_loss": results["final_loss"],
        "step_time": _step_time(entry.metrics),
    }


def _step_time(lines: list[dict[str, Any]]) -> dict[str, float | None] | None:
    """Return the mean seconds of a step's parts, and what evaluating and saving took in all; None = not logged."""
    timed = [line for line in lines if "compute_seconds" in line]
    if not timed:
        return None
    parts: dict[str, float | None] = {}
    for name in ("data", "compute", "communication"):
        known = [line[f"{name}_seconds"] for line in timed if line[f"{name}_seconds"] is not None]
        parts[name] = sum(known) / len(known) if known else None
    for name, key in (("evaluation", "evaluation_seconds"), ("save_stall", "save_stall_seconds")):
        parts[name] = sum(line.get(key, 0.0) for line in timed)
    return parts
