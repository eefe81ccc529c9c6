"""When two runs of an entry would give the same product: equal recipe, equal inputs, equal package version."""

import hashlib
import importlib.metadata
import json
from typing import Any

_IGNORED_KEYS = ("name", "output_dir", "tracking", "cluster")
"""Where a run lies, what it is called, who watches it and what queue it waits in do not change its product."""

_IGNORED_ENGINE_KEYS = ("threads", "data_parallel", "fsdp2", "megatron")
"""How ranks share the work changes the order of sums and nothing else: a run may go on with another number of GPUs.
DeepSpeed's stay in, because its states continue on the same ones only."""

_IGNORED_TRAINING_KEYS = ("save_interval_seconds", "keep_last", "on_save_failure", "watchdog_seconds")
"""How a training survives does not change what it learns, and may be changed between two attempts."""


def package_version() -> str:
    """Return the version of the installed package."""
    return importlib.metadata.version("nanotrain")


def fingerprinted(resolved: dict[str, Any]) -> dict[str, Any]:
    """Return what of a resolved recipe changes the product.

    `*_from` keys go out because the digests of what they name come in.
    """
    kept = {key: value for key, value in resolved.items() if key not in _IGNORED_KEYS}
    kept["engine"] = {key: value for key, value in resolved["engine"].items() if key not in _IGNORED_ENGINE_KEYS}
    kept["stage"] = {key: value for key, value in resolved["stage"].items() if not key.endswith("_from")}
    if "training" in kept["stage"]:
        training = kept["stage"]["training"].items()
        kept["stage"]["training"] = {key: value for key, value in training if key not in _IGNORED_TRAINING_KEYS}
    return kept


def recipe_digest(resolved: dict[str, Any], stage: str) -> str:
    """Return the sha256 of the part of the recipe that changes the product.

    Args:
        resolved: the recipe as plain values.
        stage: class name of the stage's config, which the plain values do not show.
    """
    text = json.dumps({"stage": stage, "recipe": fingerprinted(resolved)}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def fingerprint(recipe: str, input_digests: dict[str, str]) -> str:
    """Return the sha256 over a recipe's digest, the digests of its inputs by key, and the package version."""
    text = json.dumps({"recipe": recipe, "inputs": input_digests, "version": package_version()}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def changes(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """Return `key: old -> new` for every value that differs between two resolved recipes, by what changes a product."""
    before, after = _flat(fingerprinted(old), ""), _flat(fingerprinted(new), "")
    keys = sorted(key for key in before.keys() | after.keys() if before.get(key) != after.get(key))
    return [f"{key}: {before.get(key, 'unset')} -> {after.get(key, 'unset')}" for key in keys]


def _flat(value: Any, path: str) -> dict[str, Any]:
    if isinstance(value, dict) and value:
        return {k: v for key, item in value.items() for k, v in _flat(item, f"{path}.{key}".lstrip(".")).items()}
    if isinstance(value, list) and value:
        return {k: v for i, item in enumerate(value) for k, v in _flat(item, f"{path}[{i}]").items()}
    return {path: value}
