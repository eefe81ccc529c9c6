"""The whole stage on a tiny parent and a tiny prepared folder: contract, budgets, resume after a kill, refusals."""

import itertools
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from nanotrain.checkpoint.hf_folder import load_config, load_model, load_state_dict, load_tokenizer, save_model
from nanotrain.checkpoint.provenance import load_provenance
from nanotrain.config.data import CATEGORIES
from nanotrain.config.engine import Device, EngineConfig, Precision, TrackingConfig
from nanotrain.config.errors import UserError
from nanotrain.config.model import ModelConfig
from nanotrain.config.stage import ImportanceKind, PruneConfig, PruneSearchConfig
from nanotrain.data.loader import validation_batches
from nanotrain.data.manifest import write_manifest
from nanotrain.data.token_shards import TokenShardWriter
from nanotrain.data.tokenizer import build_tokenizer, save_tokenizer, token_byte_lengths
from nanotrain.model.hybrid import HybridModel
from nanotrain.planning.parameters import count_parameters
from nanotrain.pruning.plan import PruningPlan
from nanotrain.pruning.slice import slice_state_dict
from nanotrain.runtime.files import file_digest, folder_digest
from nanotrain.runtime.progress import Progress
from nanotrain.runtime.run import Run
from nanotrain.stages.prune import prune

VOCABULARY = 1256  # specials and single bytes
PARENT = ModelConfig(
    hybrid_layer_pattern="M-M*-M*-",
    vocab_size=VOCABULARY,
    hidden_size=16,
    intermediate_size=24,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=8,
    mamba_num_heads=4,
    mamba_head_dim=10,
    ssm_state_size=8,
    n_groups=2,
    chunk_size=8,
    initializer_range=0.2,
)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    save_tokenizer(build_tokenizer(r"\S+|\s+", [bytes([byte]) for byte in range(256)]), folder / "tokenizer")
    files = [f"tokenizer/{file.name}" for file in sorted((folder / "tokenizer").iterdir())]
    rng = np.random.default_rng(0)
    for category, split in itertools.product(CATEGORIES, ("train", "validation")):
        writer = TokenShardWriter(folder / category / split, np.uint16)
        for _ in range(6 if split == "train" else 2):
            writer.add_document([*(1000 + rng.integers(97, 123, rng.integers(20, 60))), 2])
        writer.finish()
        files += [f"{category}/{split}.bin", f"{category}/{split}.idx"]
    digest = file_digest(folder / "tokenizer" / "tokenizer.json")
    write_manifest(folder, {"tokenizer_digest": digest}, files)
    return folder


@pytest.fixture(scope="module")
def parent(tmp_path_factory, data) -> Path:
    folder = tmp_path_factory.mktemp("parent") / "hf"
    model = HybridModel(PARENT)
    model.init_weights(3)
    save_model(model, folder, tokenizer_from=data / "tokenizer")
    return folder


def config(**changes) -> PruneConfig:
    search = {
        "num_layers": [7, 6],
        "hidden_size": [12, 14],
        "intermediate_size": [16, 20],
        "mamba_num_heads": [2, 4],
        "max_parameters_fraction": 0.8,
        "top_candidates": 2,
    }
    search |= changes.pop("search", {})
    sizes = {
        "calibration_samples": 5,
        "calibration_sequence_length": 24,
        "micro_batch_size": 2,
        "evaluation_tokens": 48,
    }
    return PruneConfig(search=PruneSearchConfig(**search), **(sizes | changes))


def run_in(folder: Path, parent: Path, data: Path, seed: int = 1) -> Run:
    engine = EngineConfig(device=Device.cpu, precision=Precision.fp32, threads=1)
    inputs = {"init_from": parent, "data_from": data}
    return Run("test", "prune", folder, seed, engine, TrackingConfig(), inputs)


def results_of(run: Run) -> dict:
    return json.loads((run.folder / "results.json").read_text())


@pytest.fixture(scope="module")
def finished(tmp_path_factory, parent, data) -> Run:
    run = run_in(tmp_path_factory.mktemp("run"), parent, data)
    assert prune(config(), run) == run.folder / "hf"
    return run


def test_the_product_is_the_parent_cut_by_its_plan(finished, parent):
    folder = finished.folder / "hf"
    plan = PruningPlan.load(folder / "plan.json")
    tensors, small = slice_state_dict(load_state_dict(parent), PARENT, plan)
    assert load_config(folder) == small
    stored = load_state_dict(folder)
    assert stored.keys() == tensors.keys() and all(torch.equal(stored[name], one) for name, one in tensors.items())
    assert load_tokenizer(folder).vocab_size == VOCABULARY
    provenance = load_provenance(folder)
    assert provenance is not None and provenance.parent == parent.as_posix()
    assert provenance.parent_digest == folder_digest(parent) and provenance.seed == 1


def test_results_keep_the_contract(finished):
    results, small = results_of(finished), load_config(finished.folder / "hf")
    assert results["parameters_before"] == count_parameters(PARENT)
    assert results["parameters_after"] == count_parameters(small) <= 0.8 * count_parameters(PARENT)
    assert results["kept"] == json.loads((finished.folder / "hf" / "plan.json").read_text())

    assert len(results["layer_removal"]) == 2
    for removal in results["layer_removal"]:
        assert removal["kind"] == PARENT.hybrid_layer_pattern[removal["layer"]] and removal["mse"] > 0
    gone = [one["layer"] for one in results["layer_removal"]][: 8 - small.num_hidden_layers]
    assert results["kept"]["layers"] == [layer for layer in range(8) if layer not in gone]

    candidates, rest = results["candidates"], results["unscored_candidates"]
    assert len(candidates) == 2 and len(candidates) + len(rest) == 16
    (chosen,) = [one for one in candidates if one["chosen"]]
    assert chosen["held_out"] == min(one["held_out"] for one in candidates) == results["held_out_after"]["average"]
    assert chosen["parameters"] == results["parameters_after"]
    sizes = ("num_layers", "hidden_size", "intermediate_size", "mamba_num_heads")
    assert [chosen[key] for key in sizes[1:]] == [small.__dict__[key] for key in sizes[1:]]
    largest = max(one["parameters"] for one in candidates + rest if one["fits"])
    assert candidates[0]["parameters"] == largest and all(one["fits"] for one in candidates)

    importance = results["importance"]
    assert len(importance["hidden"]) == 16
    kept = results["kept"]["layers"]
    assert list(map(int, importance["ffn"])) == [i for i in kept if PARENT.hybrid_layer_pattern[i] == "-"]
    assert all(len(one) == 24 for one in importance["ffn"].values())
    assert all(len(one) == 4 for one in importance["mamba_heads"].values())
    best = sorted(range(16), key=lambda i: -importance["hidden"][i])[: small.hidden_size]
    assert results["kept"]["hidden"] == sorted(best)


@torch.no_grad()
def test_held_out_numbers_equal_a_plain_computation(finished, parent, data):
    results = results_of(finished)
    lengths = torch.from_numpy(np.asarray(token_byte_lengths(data / "tokenizer"), dtype=np.int64))
    for folder, key in ((parent, "held_out_before"), (finished.folder / "hf", "held_out_after")):
        model = load_model(folder)
        bits = {}
        for category in CATEGORIES:
            nats, num_bytes = 0.0, 0
            batches = validation_batches(data, category, sequence_length=24, micro_batch_size=1, max_tokens=48)
            for batch in batches:
                logits = model(batch.input_ids, batch.segment_ids).double()
                counted = batch.labels != -100
                nats += torch.nn.functional.cross_entropy(
                    logits[counted], batch.labels[counted], reduction="sum"
                ).item()
                num_bytes += int(lengths[batch.labels[counted]].sum())
            bits[category] = nats / math.log(2) / num_bytes
        assert results[key]["bits_per_byte"] == pytest.approx(bits, rel=1e-5)
        assert results[key]["average"] == pytest.approx(sum(bits.values()) / len(bits), rel=1e-5)


class Killed(BaseException):
    pass


def test_kills_at_any_work_item_end_in_the_same_files(finished, parent, data, tmp_path, monkeypatch):
    run, record, countdown = run_in(tmp_path, parent, data), Progress.record, [0]

    def killing(self, key, value):
        if countdown[0] == 0:
            raise Killed
        countdown[0] -= 1
        return record(self, key, value)

    kills = 0
    with monkeypatch.context() as patch:
        patch.setattr(Progress, "record", killing)
        while True:
            countdown[0] = 4  # every attempt finishes four items, then dies
            try:
                prune(config(), run)
            except Killed:
                kills += 1
                continue
            break
    # 5 categories x (parent + 2 candidates) + 2 removals x 3 micro-batches
    assert kills == (5 * 3 + 2 * 3) // 4
    assert (run.folder / "results.json").read_bytes() == (finished.folder / "results.json").read_bytes()
    mine, other = load_state_dict(run.folder / "hf"), load_state_dict(finished.folder / "hf")
    assert all(torch.equal(mine[name], tensor) for name, tensor in other.items())


def test_attention_layers_and_nested_depths(tmp_path, parent, data):
    run = run_in(tmp_path, parent, data)
    prune(config(search={"num_layers": [6], "num_attention_layers": 1}), run)
    small = load_config(run.folder / "hf")
    assert small.num_hidden_layers == 6 and small.hybrid_layer_pattern.count("*") == 1


def test_random_importance_is_another_model_of_the_same_size(tmp_path, finished, parent, data):
    run = run_in(tmp_path, parent, data)
    only = load_config(finished.folder / "hf")
    search = {"hidden_size": [only.hidden_size], "intermediate_size": [only.intermediate_size]}
    search |= {"mamba_num_heads": [only.mamba_num_heads], "num_layers": [only.num_hidden_layers]}
    prune(config(importance=ImportanceKind.random, search=search), run)
    results = results_of(run)
    assert all(one["mse"] is None for one in results["layer_removal"])
    assert results["kept"] != results_of(finished)["kept"]
    assert results["held_out_before"] == results_of(finished)["held_out_before"]
    other = run_in(tmp_path / "other", parent, data, seed=2)
    prune(config(importance=ImportanceKind.random, search=search), other)
    assert results_of(other)["kept"] != results["kept"]


def test_the_parents_dtype_stays(tmp_path, parent, data):
    folder = tmp_path / "bf16"
    save_model(load_model(parent), folder, dtype=torch.bfloat16)
    run = run_in(tmp_path / "run", folder, data)
    whole = {"num_layers": [], "hidden_size": [], "intermediate_size": [], "max_parameters_fraction": 1.0}
    prune(config(search=whole | {"mamba_num_heads": [2]}), run)
    tensors = load_state_dict(run.folder / "hf")
    assert tensors["lm_head.weight"].dtype is torch.bfloat16
    assert tensors["backbone.layers.0.mixer.A_log"].dtype is torch.float32
    assert load_config(run.folder / "hf").mamba_num_heads == 2


class TestRefusals:
    def refuse(self, tmp_path, parent, data, message, **changes):
        run = run_in(tmp_path, parent, data)
        with pytest.raises(UserError, match=message):
            prune(config(**changes), run)
        assert not (run.folder / "hf").exists()

    def test_no_candidate_fits(self, tmp_path, parent, data):
        message = "No candidate of `stage.search` fits `max_parameters_fraction`"
        self.refuse(tmp_path, parent, data, message, search={"max_parameters_fraction": 0.05})

    @pytest.mark.parametrize(
        "search, message",
        [
            ({"hidden_size": [17]}, "`stage.search.hidden_size`"),
            ({"mamba_num_heads": [3]}, "`stage.search.mamba_num_heads`"),
            ({"num_layers": [9]}, "`stage.search.num_layers`"),
            ({"num_attention_layers": 3}, "`stage.search.num_attention_layers`"),
        ],
    )
    def test_sizes_that_the_parent_cannot_give(self, tmp_path, parent, data, search, message):
        self.refuse(tmp_path, parent, data, message, search=search)
        assert not (tmp_path / "prune" / "progress.jsonl").exists()

    def test_calibration_sequences_longer_than_the_text(self, tmp_path, parent, data):
        message = (
            r"train.bin` holds \d+ tokens, fewer than one sequence of `stage.calibration_sequence_length` \(9999\)"
        )
        self.refuse(tmp_path, parent, data, message, calibration_sequence_length=9999)

    def test_a_parent_without_a_finite_loss(self, tmp_path, parent, data):
        broken = load_model(parent)
        with torch.no_grad():
            broken.backbone.norm_f.weight.fill_(math.nan)
        save_model(broken, tmp_path / "broken")
        self.refuse(tmp_path, tmp_path / "broken", data, "held-out loss of `stage.init_from` .* is nan")

    def test_a_parent_with_another_tokenizer(self, tmp_path, parent, data):
        tokens = [bytes([byte]) for byte in range(256)]
        save_tokenizer(build_tokenizer(r"\w+|\W+", tokens), tmp_path / "tokenizer")
        save_model(load_model(parent), tmp_path / "other", tokenizer_from=tmp_path / "tokenizer")
        self.refuse(tmp_path, tmp_path / "other", data, "is not the tokenizer of the data")
