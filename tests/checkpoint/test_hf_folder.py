"""The folder as a whole: round trips, dtypes, published forms, and every way in which it can be broken."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from nanotrain.checkpoint.hf_folder import (
    load_config,
    load_model,
    load_state_dict,
    load_tokenizer,
    save_model,
    save_state_dict,
    verify_against_transformers,
)
from nanotrain.checkpoint.provenance import Provenance, load_provenance
from nanotrain.checkpoint.verification import VerificationError
from nanotrain.config.errors import MissingInputError, UserError
from nanotrain.config.model import ModelConfig
from nanotrain.model.hybrid import HybridModel
from nanotrain.planning.parameters import FP32_TENSORS
from tests.checkpoint.conftest import small_config, write_tokenizer


def edit_tensors(folder: Path, change) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("max_shard_bytes", [3000, 2**30])
def test_round_trip_is_bit_equal(tmp_path: Path, tied: bool, max_shard_bytes: int) -> None:
    model = HybridModel(small_config(tie_word_embeddings=tied))
    model.init_weights(2)
    save_model(model, tmp_path / "hf", max_shard_bytes=max_shard_bytes)
    loaded = load_model(tmp_path / "hf")
    assert loaded.config == model.config and not loaded.training
    assert all(
        torch.equal(a, b) for a, b in zip(loaded.state_dict().values(), model.state_dict().values(), strict=True)
    )
    assert (loaded.lm_head.weight is loaded.backbone.embeddings.weight) == tied
    ids = torch.arange(10)[None]
    assert torch.equal(loaded(ids), model.eval()(ids)) and loaded(ids).shape == (1, 10, 40)
    loaded.train()(ids).sum().backward()  # parameters, not views of a file
    assert all(p.requires_grad for p in loaded.parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_save_dtype_and_the_tensors_that_stay_fp32(model: HybridModel, tmp_path: Path, dtype: torch.dtype) -> None:
    save_model(model, tmp_path / "hf", dtype=dtype)
    stored = load_file(tmp_path / "hf" / "model.safetensors")
    for name, tensor in stored.items():
        assert tensor.dtype == (torch.float32 if name.endswith(FP32_TENSORS) else dtype), name
    content = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert content["dtype"] == content["torch_dtype"] == str(dtype).removeprefix("torch.")
    narrow = load_model(tmp_path / "hf", dtype=torch.bfloat16)
    assert {p.dtype for name, p in narrow.named_parameters() if name.endswith(FP32_TENSORS)} == {torch.float32}
    assert {p.dtype for p in load_model(tmp_path / "hf", dtype=torch.float64).parameters()} == {torch.float64}
    result = verify_against_transformers(tmp_path / "hf")
    assert result["max_abs_logit_difference"] < 1e-4 and result["tokens_checked"] >= 2 * (model.config.chunk_size + 1)


def test_published_form_loads_and_the_change_of_the_dt_floor_is_recorded(folder: Path, tmp_path: Path) -> None:
    """Old embedding prefix, only the pattern string, a clamp key with Infinity, no file of ours."""
    expected = load_state_dict(folder)

    def rename(tensors: dict) -> None:
        tensors["backbone.embedding.weight"] = tensors.pop("backbone.embeddings.weight")

    edit_tensors(folder, rename)
    content = json.loads((folder / "config.json").read_text())
    for key in ("layers_block_type", "dt_init_min", "dt_init_max", "dt_init_floor"):
        del content[key]
    content |= {"time_step_min": 0.001, "time_step_limit": [0.0, float("inf")]}
    (folder / "config.json").write_text(json.dumps(content))
    state = load_state_dict(folder)
    assert all(torch.equal(state[name], expected[name]) for name in expected)
    model = load_model(folder)
    save_model(model, tmp_path / "child", provenance=Provenance("import", parent=str(folder)))
    shutil.rmtree(folder)
    save_model(model, tmp_path / "grandchild", provenance=Provenance("sft", parent=str(tmp_path / "child")))
    for name in ("child", "grandchild"):
        provenance = load_provenance(tmp_path / name)
        assert provenance is not None
        assert provenance.config_changes["time_step_min"]["from"] == 0.001
        assert "time_step_min" in (tmp_path / name / "README.md").read_text()
    assert all(torch.equal(t, expected[n]) for n, t in load_state_dict(tmp_path / "grandchild").items())


def test_names_as_transformers_has_them_in_memory_are_read_too(folder: Path) -> None:
    expected = load_state_dict(folder)

    def rename(tensors: dict) -> None:
        for name in [n for n in tensors if n.startswith("backbone.")]:
            tensors[name.replace("backbone.", "model.", 1)] = tensors.pop(name)

    edit_tensors(folder, rename)
    assert all(torch.equal(t, expected[n]) for n, t in load_state_dict(folder).items())


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda t: t.pop("backbone.layers.2.mixer.q_proj.weight"), "backbone.layers.2.mixer.q_proj.weight is missing"),
        (lambda t: t.update({"backbone.extra": torch.zeros(1)}), "backbone.extra is unexpected"),
        (lambda t: t.update({"backbone.norm_f.weight": torch.zeros(3)}), r"norm_f.weight has the shape \[3\]"),
        (lambda t: t.update({"model.norm_f.weight": torch.zeros(16)}), "are the same one"),
    ],
)
def test_wrong_tensors_are_named(folder: Path, change, said: str) -> None:
    edit_tensors(folder, change)
    with pytest.raises(UserError, match=said):
        load_model(folder)


def test_broken_folders(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(MissingInputError, match="absent is not a folder"):
        load_model(tmp_path / "absent")
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[:-100])
    with pytest.raises(UserError, match=r"model\.safetensors is corrupt or cut off"):
        load_model(folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(MissingInputError, match=r"no model\.safetensors"):
        load_model(folder)
    (folder / "config.json").write_text("{}")
    with pytest.raises(UserError, match="model_type"):
        load_config(folder)


def test_tied_embeddings_that_differ(tmp_path: Path) -> None:
    model = HybridModel(small_config(tie_word_embeddings=True))
    model.init_weights(0)
    save_model(model, tmp_path)
    edit_tensors(tmp_path, lambda tensors: tensors["lm_head.weight"].add_(1))
    with pytest.raises(UserError, match="tie_word_embeddings"):
        load_model(tmp_path)
    edit_tensors(tmp_path, lambda tensors: tensors.pop("lm_head.weight"))
    assert torch.equal(load_model(tmp_path).output_weight(), model.output_weight())


def test_save_replaces_whole_or_not_at_all(folder: Path, model: HybridModel) -> None:
    (folder / "stale.txt").write_text("from an older save")
    before = (folder / "model.safetensors").read_bytes()
    state = model.state_dict()
    del state["lm_head.weight"]
    with pytest.raises(AssertionError, match="configuration"):
        save_state_dict(state, model.config, folder)
    with pytest.raises(MissingInputError, match="tokenizer"):
        save_model(model, folder, tokenizer_from=folder / "nowhere")
    assert (folder / "model.safetensors").read_bytes() == before and (folder / "stale.txt").exists()
    save_model(model, folder)
    assert not (folder / "stale.txt").exists()
    assert sorted(path.name for path in folder.parent.iterdir()) == ["hf"]


def test_equal_models_are_written_as_equal_bytes(model: HybridModel, tmp_path: Path) -> None:
    for name in ("a", "b"):
        save_model(model, tmp_path / name, provenance=Provenance("test"))
    for path in (tmp_path / "a").iterdir():
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes(), path.name


def test_tokenizer_travels_with_the_weights(model: HybridModel, tmp_path: Path) -> None:
    source = write_tokenizer(tmp_path / "tokenizer", 40)
    save_model(model, tmp_path / "hf", tokenizer_from=source)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert (tmp_path / "hf" / name).read_bytes() == (source / name).read_bytes()
    tokenizer = load_tokenizer(tmp_path / "hf")
    assert tokenizer.encode("w3 w39") == [3, 39] and tokenizer.chat_template


def test_tokenizer_that_does_not_fit(model: HybridModel, folder: Path, tmp_path: Path) -> None:
    source = write_tokenizer(tmp_path / "tokenizer", 41)
    with pytest.raises(UserError, match=r"41 tokens, the model's `vocab_size` is 40"):
        save_model(model, tmp_path / "new", tokenizer_from=source)
    assert not (tmp_path / "new").exists()
    shutil.copy(source / "tokenizer.json", folder)
    with pytest.raises(UserError, match=r"41 tokens"):
        load_tokenizer(folder)
    (source / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match="cannot be read"):
        load_tokenizer(source)
    (source / "tokenizer.json").unlink()
    with pytest.raises(MissingInputError, match=r"tokenizer\.json is missing"):
        load_tokenizer(source)


def test_verification_notices_a_difference(folder: Path, config: ModelConfig) -> None:
    """A norm epsilon that only transformers is told of, and a floor under dt."""
    assert config.layer_norm_epsilon == 1e-5
    content = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(content | {"time_step_min": 0.5}))
    with pytest.raises(VerificationError, match="logits differ"):
        verify_against_transformers(folder)
