"""`--resume-check`: runs a few steps of a recipe's own trainings straight, and again interrupted, and compares.

The recipe stays as it is (model, data, engine, optimizer, curriculum), only shorter: the phases and the schedule shrink
with the steps, so that all of them are passed. Everything is compared that a resume could change: every file of the last
state (weights, optimizer, random states of every rank), the exported weights, and the logged numbers.
"""

import json
import logging
import shutil
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from nanotrain.checkpoint.resume import DIGESTS_FILE, ENGINE_FOLDER, list_states
from nanotrain.config.engine import TrackingConfig
from nanotrain.config.errors import UserError, nearest
from nanotrain.config.load import LoadedEntry, LoadedRecipe
from nanotrain.config.load_messages import shown_path
from nanotrain.config.stage import TRAINING_STAGES, StageConfig
from nanotrain.config.training import TrainingConfig
from nanotrain.pipeline.inputs import InputRef, resolve_inputs
from nanotrain.pipeline.preflight import Preflight
from nanotrain.pipeline.products import load_record
from nanotrain.runtime.distributed import current_world, on_first, wait_for_all
from nanotrain.runtime.files import file_digest
from nanotrain.runtime.run import Run
from nanotrain.runtime.signals import Preempted

log = logging.getLogger("nanotrain")

MIN_STEPS = 2
_NEVER_SECONDS = 1e9
_CLOCKS = ("seconds", "tokens_per_second", "mfu", "memory_bytes")


def check_resume(
    recipe: LoadedRecipe,
    stages: Callable[[], Mapping[type[StageConfig], Callable[[Any, Run], Path]]],
    *,
    steps: int,
    only: str | None = None,
) -> list[str]:
    """Return one line for each training entry: equal, or what differs.

    Args:
        recipe: composed and validated; the entries that its trainings start from are finished.
        stages: returns the table of stage functions.
        steps: length of each training.
        only: check this entry alone.

    Raises:
        UserError: there is nothing to check, or an input has not been made yet.
    """
    if steps < MIN_STEPS:
        raise UserError(
            f"`--resume-check {steps}` must be at least {MIN_STEPS}: there is an interruption in the middle."
        )
    entries = [entry for entry in recipe.entries if isinstance(entry.config.stage, TRAINING_STAGES)]
    if only is not None:
        entries = [entry for entry in entries if entry.name == only]
    if not entries:
        names = [entry.name for entry in recipe.entries if isinstance(entry.config.stage, TRAINING_STAGES)]
        what = (
            f"`--only {only}` names no training entry; {nearest(only, names)}"
            if only
            else "this recipe trains nothing."
        )
        raise UserError(f"`--resume-check`: {what}")
    inputs = on_first(lambda: resolve_inputs(recipe))
    preflight = Preflight(recipe, inputs)
    for entry in entries:
        preflight.check_ranks(entry, current_world().size)
    folders = on_first(lambda: {entry.name: _input_folders(recipe, entry, inputs[entry.name]) for entry in entries})
    return [_check_entry(recipe, entry, folders[entry.name], stages, steps) for entry in entries]


def _input_folders(recipe: LoadedRecipe, entry: LoadedEntry, refs: list[InputRef]) -> dict[str, Path]:
    folders = {}
    for ref in refs:
        record = None if ref.folder is not None else load_record(recipe.output_dir / ref.entry)
        if ref.folder is None and record is None:
            raise UserError(
                f"`--resume-check` of {entry.name!r} starts from {ref.entry!r}, which is not finished in"
                f" {shown_path(recipe.output_dir)}; run the recipe up to it first, or check another entry with `--only`."
            )
        path = ref.folder if record is None else record.product_path(recipe.output_dir / ref.entry)
        assert path is not None
        folders[ref.key] = path.absolute()
    return folders


def _check_entry(recipe: LoadedRecipe, entry: LoadedEntry, inputs: dict[str, Path], stages: Any, steps: int) -> str:
    stage = replace(entry.config.stage, training=shortened(entry.config.stage.training, steps))  # type: ignore[attr-defined]
    function = stages()[type(stage)]
    parent = recipe.output_dir.absolute().parent
    scratch = Path(on_first(lambda: _make_scratch(parent, entry.name)))
    cut = steps // 2

    def run_in(folder: str, stop_after: int | None = None) -> Run:
        config = entry.config
        return Run(
            recipe.name, entry.name, scratch / folder, config.seed, config.engine, TrackingConfig(), inputs, stop_after
        )

    try:
        log.info("%s: %d steps straight", entry.name, steps)
        function(stage, run_in("straight"))
        log.info("%s: %d steps, interrupted after %d and resumed", entry.name, steps, cut)
        try:
            function(stage, run_in("resumed", stop_after=cut))
            raise AssertionError("the training did not stop where it was told to")
        except Preempted:
            wait_for_all()
        function(stage, run_in("resumed"))
        wait_for_all()
        found = on_first(lambda: differences(scratch / "straight" / entry.name, scratch / "resumed" / entry.name))
    finally:
        if current_world().is_first:
            shutil.rmtree(scratch, ignore_errors=True)
    if not found:
        return f"{entry.name}: resumed after step {cut} of {steps}, equal bit for bit (weights, optimizer, random states, numbers)"
    return f"{entry.name}: resumed after step {cut} of {steps}, {len(found)} things differ: {'; '.join(found[:5])}"


def _make_scratch(parent: Path, name: str) -> str:
    parent.mkdir(parents=True, exist_ok=True)
    return tempfile.mkdtemp(prefix=f".resume-check-{name}-", dir=parent)


def shortened(training: TrainingConfig, steps: int) -> TrainingConfig:
    """Return the same training at a length of `steps`: warm-up and decay shrink in proportion, held-out text to a bit."""
    part = steps / training.steps
    schedule = training.schedule
    warmup = min(steps, round(schedule.warmup_steps * part) or int(schedule.warmup_steps > 0))
    decay = min(steps - warmup, round(schedule.decay_steps * part) or int(schedule.decay_steps > 0))
    return replace(
        training,
        steps=steps,
        schedule=replace(schedule, warmup_steps=warmup, decay_steps=decay),
        evaluation_interval=0,
        evaluation_tokens=training.sequence_length,
        save_interval_seconds=_NEVER_SECONDS,
        log_interval=1,
    )


def differences(straight: Path, resumed: Path) -> list[str]:
    """Return what differs between the last states, the exported weights and the logged numbers of two trainings."""
    found = []
    (_, one), (_, other) = (list_states(folder / "state")[-1] for folder in (straight, resumed))
    digests = [json.loads((state / DIGESTS_FILE).read_text(encoding="utf-8")) for state in (one, other)]
    for name in sorted(digests[0].keys() | digests[1].keys()):
        if name.startswith(ENGINE_FOLDER) and digests[0].get(name) != digests[1].get(name):
            found.append(f"{name} of the last state")
    weights = sorted(file.name for file in (straight / "hf").glob("*.safetensors"))
    found += [name for name in weights if file_digest(straight / "hf" / name) != file_digest(resumed / "hf" / name)]
    lines = [_numbers(folder / "metrics.jsonl") for folder in (straight, resumed)]
    if len(lines[0]) != len(lines[1]):
        found.append(f"the number of logged steps ({len(lines[0])} and {len(lines[1])})")
    for first, second in zip(*lines, strict=False):
        keys = [key for key in first if first[key] != second.get(key)]
        found += [f"{key} of step {first['step']} ({first[key]} and {second.get(key)})" for key in keys]
    return found


def _numbers(file: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    return [{key: value for key, value in line.items() if not key.endswith(_CLOCKS)} for line in lines]
