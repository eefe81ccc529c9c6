"""Pruning: layers by logit error, then hidden channels, FFN neurons and Mamba-2 heads by activation, within a budget."""

import dataclasses
import logging
import math
from pathlib import Path
from typing import Any

from nanotrain.checkpoint.hf_folder import load_config, load_model, load_state_dict, save_state_dict
from nanotrain.checkpoint.provenance import Provenance
from nanotrain.config.errors import UserError
from nanotrain.config.model import ModelConfig
from nanotrain.config.stage import ImportanceKind, PruneConfig
from nanotrain.data.manifest import DataFolder
from nanotrain.engines import build_local_engine
from nanotrain.engines.base import Engine
from nanotrain.evaluation.held_out import HeldOutSums, combine_held_out, held_out_sums
from nanotrain.model.batch import MicroBatch
from nanotrain.model.hybrid import HybridModel, build_meta_model
from nanotrain.planning.parameters import count_parameters
from nanotrain.pruning.calibration import calibration_batches
from nanotrain.pruning.importance import Aggregations, WidthScores, measure_width_importance
from nanotrain.pruning.layer_removal import DepthTargets, LayerRemoval, remove_layers
from nanotrain.pruning.plan import PruningPlan
from nanotrain.pruning.random_importance import random_width_scores, remove_random_layers
from nanotrain.pruning.ranking import plan_from_scores
from nanotrain.pruning.search import Candidate, choose, enumerate_candidates, shortlist, validate_widths
from nanotrain.pruning.slice import slice_state_dict
from nanotrain.runtime.files import write_json_atomic
from nanotrain.runtime.progress import Progress
from nanotrain.runtime.run import Run
from nanotrain.runtime.seeding import derived_seed
from nanotrain.stages.training_products import PRODUCT, RESULTS, check_vocabulary, parent_of, tokenizer_folder

PLAN_FILE = "plan.json"
PROGRESS_FILE = "progress.jsonl"

logger = logging.getLogger("nanotrain")


def prune(config: PruneConfig, run: Run) -> Path:
    """Cut the model of `init_from` down to the best candidate of the search and return its checkpoint folder.

    Args:
        config: importance, calibration, search.
        run: inputs `init_from` and `data_from`.

    Raises:
        UserError: the parent cannot give the wanted sizes, or no candidate fits the budget.
    """
    parent_folder, data = run.inputs["init_from"], run.inputs["data_from"]
    parent = load_config(parent_folder)
    targets = DepthTargets.from_search(
        parent.hybrid_layer_pattern, config.search.num_layers, config.search.num_attention_layers
    )
    validate_widths(config.search, parent)
    check_vocabulary(parent, data, "stage.init_from")
    if (parent_folder / "tokenizer.json").is_file():
        DataFolder(data).check_tokenizer(parent_folder)

    pruner = _Pruner(config, run, load_model(parent_folder), targets)
    before = pruner.held_out_of_parent()
    removals, scores = pruner.importance()
    kept_layers = targets.kept_layers([removal.layer for removal in removals])
    patterns = {depth: _pattern(parent, layers) for depth, layers in kept_layers.items()}
    candidates = enumerate_candidates(config.search, parent, patterns)
    listed = shortlist(candidates, config.search, parent)
    plans = {one: _plan(parent, kept_layers[one.num_layers], scores[one.num_layers], one) for one in listed}
    held_out = {one: pruner.held_out_of(plan) for one, plan in plans.items()}
    chosen, scored = choose(listed, lambda one: held_out[one]["average"])
    after = held_out[chosen]
    if not math.isfinite(after["loss"]):
        raise UserError(
            f"None of the {len(listed)} candidates of `stage.search` has a finite held-out loss; prune less, or list more"
            " sizes and raise `top_candidates`."
        )
    logger.info("kept %s parameters of %s", f"{chosen.parameters:,}", f"{count_parameters(parent):,}")

    results = {
        "parameters_before": count_parameters(parent),
        "parameters_after": chosen.parameters,
        "held_out_before": before,
        "held_out_after": after,
        "layer_removal": [removal.to_json() for removal in removals],
        "importance": _importance_json(scores[chosen.num_layers]),
        "candidates": [one.to_json(chosen) for one in scored],
        "unscored_candidates": [one.to_json() for one in candidates if one not in plans],
        "kept": plans[chosen].to_json(),
    }
    folder = _save(run, parent_folder, parent, plans[chosen], after)
    write_json_atomic(run.folder / RESULTS, results)
    pruner.forget_sums()
    return folder


class _Pruner:
    """The parent on its engine, the calibration text, and what a killed attempt has left."""

    def __init__(self, config: PruneConfig, run: Run, model: HybridModel, targets: DepthTargets) -> None:
        self._config, self._run, self._targets = config, run, targets
        self._parent = model.config
        self._calibration = [] if config.importance is ImportanceKind.random else _calibration(config, run)
        self._progress = Progress(run.folder / PROGRESS_FILE)
        self._engine = build_local_engine(run.engine, model)

    def held_out_of_parent(self) -> dict[str, Any]:
        """Score the parent; refuse one that cannot be scored."""
        result = self._held_out(self._engine, "parent")
        if not math.isfinite(result["loss"]):
            raise UserError(
                f"The held-out loss of `stage.init_from` ({self._run.inputs['init_from']}) is {result['loss']}; a model"
                " without a finite loss cannot be pruned, take an earlier checkpoint."
            )
        return result

    def importance(self) -> tuple[list[LayerRemoval], dict[int, WidthScores]]:
        """Return the removed layers in order, and depth -> importance of the widths of what is left."""
        pattern, seed = self._parent.hybrid_layer_pattern, derived_seed(self._run.seed, "importance")
        if self._config.importance is ImportanceKind.random:
            removals = remove_random_layers(pattern, self._targets, seed)
            kept = self._targets.kept_layers([removal.layer for removal in removals])
            return removals, {depth: random_width_scores(self._parent, layers, seed) for depth, layers in kept.items()}
        aggregations = Aggregations(self._config.aggregation_sequence, self._config.aggregation_batch)
        with self._engine.inference_model() as model:
            removals = remove_layers(model, self._calibration, self._targets, self._progress)
            kept = self._targets.kept_layers([removal.layer for removal in removals])
            scores = {
                depth: measure_width_importance(
                    model,
                    layers,
                    self._calibration,
                    aggregations,
                    checkpoint=self._sums_file(depth),
                )
                for depth, layers in kept.items()
            }
        return removals, scores

    def forget_sums(self) -> None:
        """Remove the running sums of `importance`, once the product stands."""
        for depth in self._targets.depths:
            self._sums_file(depth).unlink(missing_ok=True)

    def _sums_file(self, depth: int) -> Path:
        return self._run.folder / f"importance-{depth}.safetensors"

    def held_out_of(self, plan: PruningPlan) -> dict[str, Any]:
        """Slice the parent in memory and score the result, without training."""
        with self._engine.inference_model() as model:
            tensors, config = slice_state_dict(model.state_dict(), self._parent, plan)
        child = build_meta_model(config)
        child.load_state_dict(tensors, assign=True)
        sizes = (config.num_hidden_layers, config.hidden_size, config.intermediate_size, config.mamba_num_heads)
        return self._held_out(build_local_engine(self._run.engine, child), "/".join(map(str, sizes)))

    def _held_out(self, engine: Engine, name: str) -> dict[str, Any]:
        """Score the held-out text category by category, each recorded when it is done."""
        sums = {}
        for category in DataFolder(self._run.inputs["data_from"]).sources("validation"):
            key = f"held_out/{name}/{category}"
            if key not in self._progress:
                scored = held_out_sums(
                    engine,
                    self._run.inputs["data_from"],
                    category,
                    sequence_length=self._config.calibration_sequence_length,
                    micro_batch_size=self._config.micro_batch_size,
                    max_tokens=self._config.evaluation_tokens,
                )
                self._progress.record(key, dataclasses.asdict(scored))
            sums[category] = HeldOutSums(**self._progress[key])
        result = combine_held_out(sums)
        logger.info("%s: held-out %.4f bits per byte", name, result["average"])
        return result


def _calibration(config: PruneConfig, run: Run) -> list[MicroBatch]:
    return calibration_batches(
        run.inputs["data_from"],
        num_samples=config.calibration_samples,
        sequence_length=config.calibration_sequence_length,
        micro_batch_size=config.micro_batch_size,
        seed=derived_seed(run.seed, "calibration"),
    )


def _pattern(parent: ModelConfig, layers: tuple[int, ...]) -> str:
    return "".join(parent.hybrid_layer_pattern[layer] for layer in layers)


def _plan(parent: ModelConfig, layers: tuple[int, ...], scores: WidthScores, candidate: Candidate) -> PruningPlan:
    return plan_from_scores(
        parent,
        layers,
        scores,
        hidden_size=candidate.hidden_size,
        intermediate_size=candidate.intermediate_size,
        mamba_num_heads=candidate.mamba_num_heads,
    )


def _importance_json(scores: WidthScores) -> dict[str, Any]:
    return {
        "hidden": scores.hidden.tolist(),
        "ffn": {str(layer): score.tolist() for layer, score in scores.ffn.items()},
        "mamba_heads": {str(layer): score.tolist() for layer, score in scores.mamba_heads.items()},
    }


def _save(run: Run, parent_folder: Path, parent: ModelConfig, plan: PruningPlan, held_out: dict[str, Any]) -> Path:
    """Slice the tensors as stored (their dtype stays), write the folder and its plan, and prove that it loads."""
    folder = run.folder / PRODUCT
    tensors, config = slice_state_dict(load_state_dict(parent_folder), parent, plan)
    save_state_dict(
        tensors,
        config,
        folder,
        tokenizer_from=tokenizer_folder(run.inputs["data_from"]),
        provenance=Provenance(
            stage=run.entry, seed=run.seed, metrics={"held_out_bits_per_byte": held_out["average"]}, **parent_of(run)
        ),
    )
    plan.save(folder / PLAN_FILE)
    assert load_config(folder) == config, f"{folder} was written with another architecture"
    stored = load_state_dict(folder)
    assert all(tensor.equal(stored[name]) for name, tensor in tensors.items()), f"{folder} differs from what was cut"
    return folder
