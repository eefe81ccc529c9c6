"""What this run does differently from the published one, value by value, with sources."""

from typing import Any

from nanotrain.planning import paper
from nanotrain.report.run_folder import EntryRecord, RunRecord

_TRAINING_KEYS = {
    "sequence_length": "sequence_length",
    "global_batch_size": "global_batch_size",
    "learning_rate": "learning_rate",
    "schedule.min_learning_rate": "min_learning_rate",
    "schedule.kind": "schedule",
    "schedule.decay_shape": "decay_shape",
    "optimizer.beta1": "beta1",
    "optimizer.beta2": "beta2",
    "optimizer.weight_decay": "weight_decay",
    "optimizer.gradient_clip": "gradient_clip",
}
"""Key below stage.training -> key of paper.PRETRAINING."""
_PRUNE_KEYS = {
    "calibration_samples": "calibration_samples",
    "search.context_length": "context_length",
    "search.top_candidates": "top_candidates",
    "search.num_attention_layers": "num_attention_layers",
}
_SFT_KEYS = (
    "reasoning.empty_trace_fraction",
    "reasoning.truncated_fraction",
    "reasoning.truncated_min_tokens",
    "reasoning.truncated_max_tokens",
)


def compare_with_published(run: RunRecord) -> list[dict[str, Any]]:
    """Return a row for every recipe value that has a published counterpart and differs from it.

    Each row holds entry, key (below `stage`), ours, published, status (published, derived or proxy), source, note.
    """
    rows: list[dict[str, Any]] = []
    for entry in run.entries:
        for key, published in _counterparts(entry).items():
            ours = _value_at(entry.recipe["stage"], key)
            if ours is not None and _plain(ours) != _plain(published.value):
                rows.append(_row(entry.name, key, ours, published))
        if entry.stage == "PretrainConfig" and "planned_tokens" in entry.results:
            rows.append(_row(entry.name, "tokens", entry.results["planned_tokens"], paper.PRETRAINING["tokens"]))
    return rows


def _counterparts(entry: EntryRecord) -> dict[str, paper.PublishedValue]:
    """Return the published values by recipe key, for the entry's stage."""
    if not isinstance(entry.recipe.get("stage"), dict):
        return {}
    if entry.stage == "PretrainConfig":
        sizes = {} if entry.recipe["stage"].get("architecture_from") else paper.ARCHITECTURE_12B
        architecture = {f"model.{key}": value for key, value in sizes.items()}
        training = {f"training.{ours}": paper.PRETRAINING[theirs] for ours, theirs in _TRAINING_KEYS.items()}
        return architecture | training
    if entry.stage == "PruneConfig":
        return {ours: paper.PRUNING[theirs] for ours, theirs in _PRUNE_KEYS.items()}
    if entry.stage == "SftConfig":
        return {key: paper.REASONING[key.rsplit(".", 1)[1]] for key in _SFT_KEYS}
    if entry.stage == "EvaluateConfig":
        return {"thinking_grace": paper.REASONING["budget_grace_tokens"]}
    return {}


def _row(entry: str, key: str, ours: Any, published: paper.PublishedValue) -> dict[str, Any]:
    return {
        "entry": entry,
        "key": key,
        "ours": _plain(ours),
        "published": _plain(published.value),
        "status": published.status.value,
        "sources": {source: paper.SOURCES[source] for source in published.sources},
        "note": published.note,
    }


def _value_at(section: Any, path: str) -> Any:
    """Return the value at a dotted path, None when an older recipe has no such key."""
    for key in path.split("."):
        if not isinstance(section, dict) or key not in section:
            return None
        section = section[key]
    return section


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
