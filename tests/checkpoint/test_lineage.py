import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from nanotrain.checkpoint.lineage import find_evaluations, input_folder, read_data_manifest, trace_lineage
from nanotrain.config.errors import UserError


def write_entry(
    run: Path, name: str, stage: str, inputs: dict[str, str], results: dict[str, Any], product: str = "hf"
) -> Path:
    folder = run / name
    (folder / product).mkdir(parents=True)
    sources = {
        key: {
            "path": str(run / entry / ("data" if key == "data_from" else "hf")),
            "digest": f"d-{entry}",
            "entry": entry,
        }
        for key, entry in inputs.items()
    }
    record = {"stage": stage, "product": product, "product_digest": f"d-{name}", "inputs": sources}
    (folder / "stage.json").write_text(json.dumps(record))
    (folder / "results.json").write_text(json.dumps(results))
    return folder / product


@pytest.fixture
def run(tmp_path: Path) -> Path:
    run = tmp_path / "run"
    data = write_entry(run, "prepare", "PrepareConfig", {}, {}, product="data")
    (data / "manifest.json").write_text('{"sources": [{"name": "wiki", "licence": "CC BY-SA 4.0"}]}')
    write_entry(run, "base", "PretrainConfig", {"data_from": "prepare"}, {"tokens": 10})
    write_entry(run, "small", "PruneConfig", {"init_from": "base", "data_from": "prepare"}, {"parameters_after": 5})
    write_entry(run, "tuned", "SftConfig", {"init_from": "small", "data_from": "prepare"}, {"tokens": 3})
    write_entry(run, "judge", "EvaluateConfig", {"init_from": "tuned"}, {"held_out": 1}, product="evaluation")
    write_entry(run, "judge-base", "EvaluateConfig", {"init_from": "base"}, {"held_out": 2}, product="evaluation")
    return run


def test_way_back_is_oldest_first(run: Path) -> None:
    ancestors = trace_lineage(run / "tuned" / "hf")
    assert [one.entry for one in ancestors] == ["base", "small", "tuned"]
    assert [one.stage for one in ancestors] == ["PretrainConfig", "PruneConfig", "SftConfig"]
    assert ancestors[1].results == {"parameters_after": 5}


def test_a_moved_run_is_followed_where_it_lies_now(run: Path) -> None:
    moved = run.rename(run.with_name("moved"))
    ancestors = trace_lineage(moved / "tuned" / "hf")
    assert [one.entry for one in ancestors] == ["base", "small", "tuned"]
    assert read_data_manifest(ancestors)["sources"][0]["licence"] == "CC BY-SA 4.0"


def test_evaluations_of_this_checkpoint_only(run: Path) -> None:
    assert find_evaluations(trace_lineage(run / "tuned" / "hf")[-1]) == [{"held_out": 1}]
    assert find_evaluations(trace_lineage(run / "small" / "hf")[-1]) == []


def test_lone_folders_have_no_lineage(tmp_path: Path, run: Path) -> None:
    (tmp_path / "alone").mkdir()
    assert trace_lineage(tmp_path / "alone") == []
    assert read_data_manifest([]) == {}
    shutil.copytree(run / "tuned" / "hf", run / "tuned" / "copy")
    assert trace_lineage(run / "tuned" / "copy") == []  # beside a stage.json that is about another folder


def test_a_lost_parent_ends_the_way(run: Path) -> None:
    shutil.rmtree(run / "small")
    assert [one.entry for one in trace_lineage(run / "tuned" / "hf")] == ["tuned"]
    record = json.loads((run / "tuned" / "stage.json").read_text())
    assert input_folder(run / "tuned", record, "init_from") is None
    assert input_folder(run / "tuned", record, "teacher_from") is None


def test_a_circle_ends(run: Path) -> None:
    record = json.loads((run / "base" / "stage.json").read_text())
    record["inputs"]["init_from"] = {"path": str(run / "tuned" / "hf"), "digest": "d", "entry": "tuned"}
    (run / "base" / "stage.json").write_text(json.dumps(record))
    assert len(trace_lineage(run / "tuned" / "hf")) == 3


def test_damage_is_named(run: Path) -> None:
    (run / "small" / "results.json").write_text("[1]")
    with pytest.raises(UserError, match=r"small/results\.json does not hold a JSON object"):
        trace_lineage(run / "tuned" / "hf")
