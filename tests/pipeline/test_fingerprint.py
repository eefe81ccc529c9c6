import copy

from nanotrain.pipeline import fingerprint as module
from nanotrain.pipeline.fingerprint import changes, fingerprint, recipe_digest


def leaves(value, path=()):
    if isinstance(value, dict):
        return [leaf for key, item in value.items() for leaf in leaves(item, (*path, key))]
    return [path]


SURVIVAL = ("save_interval_seconds", "keep_last", "on_save_failure", "watchdog_seconds")


def test_every_key_counts_except_place_name_tracker_cluster_threads_and_sources(load):
    """Every leaf of a composed recipe is changed in turn: a key that the digest ignored would show here."""
    resolved = load("pipeline").entries[3].resolved
    original = recipe_digest(resolved, "DistillConfig")
    unchanged = set()
    for path in leaves(resolved):
        other = copy.deepcopy(resolved)
        node = other
        for key in path[:-1]:
            node = node[key]
        node[path[-1]] = "changed"
        if recipe_digest(other, "DistillConfig") == original:
            unchanged.add(".".join(path))
    assert unchanged == {
        "name",
        "output_dir",
        "engine.threads",
        "engine.data_parallel",
        *(f"engine.{section}.{name}" for section in ("fsdp2", "megatron") for name in resolved["engine"][section]),
        "tracking.kind",
        "tracking.project",
        "tracking.mode",
        *(f"cluster.{name}" for name in resolved["cluster"]),
        *(f"stage.training.{name}" for name in SURVIVAL),
        "stage.init_from",
        "stage.teacher_from",
        "stage.data_from",
    }
    assert recipe_digest(resolved, "SftConfig") != original


def test_inputs_and_version_count(monkeypatch):
    base = fingerprint("r", {"init_from": "1"})
    assert (
        len({base, fingerprint("s", {"init_from": "1"}), fingerprint("r", {"init_from": "2"}), fingerprint("r", {})})
        == 4
    )
    monkeypatch.setattr(module, "package_version", lambda: "9.9.9")
    assert fingerprint("r", {"init_from": "1"}) != base


def test_changes_name_key_and_values(load):
    old = load("distill").entries[0].resolved
    new = (
        load("distill", "stage.training.steps=7", "stage.curriculum=[{until: 1.0, weights: {code: 2}}]")
        .entries[0]
        .resolved
    )
    assert changes(old, new) == [
        "stage.curriculum[0].weights.code: unset -> 2.0",
        "stage.curriculum[0].weights.web: 1.0 -> unset",
        "stage.training.steps: 3 -> 7",
    ]
    assert changes(old, old) == []
