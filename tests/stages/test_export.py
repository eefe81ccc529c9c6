"""The deliverable: dtype, bit-equal weights, tokenizer, card, verification, refusals."""

import json
from pathlib import Path

import pytest
import torch
import transformers

from nanotrain.checkpoint.hf_folder import load_config, load_model, load_state_dict, load_tokenizer, save_model
from nanotrain.checkpoint.provenance import Provenance, load_provenance
from nanotrain.config.engine import EngineConfig, TrackingConfig
from nanotrain.config.errors import MissingInputError, UserError
from nanotrain.config.model import ModelConfig
from nanotrain.config.stage import ExportConfig, SaveDtype
from nanotrain.data import chat
from nanotrain.data.tokenizer import build_tokenizer, save_tokenizer
from nanotrain.model.hybrid import HybridModel
from nanotrain.runtime.files import folder_digest
from nanotrain.runtime.run import Run
from nanotrain.stages.export import export, export_folder

CONFIG = ModelConfig(
    hybrid_layer_pattern="M-*",
    vocab_size=1256,
    hidden_size=16,
    intermediate_size=16,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=8,
    mamba_num_heads=2,
    mamba_head_dim=8,
    ssm_state_size=8,
    n_groups=1,
    chunk_size=8,
    initializer_range=0.2,
)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    folder = tmp_path / "prepare" / "data"
    save_tokenizer(build_tokenizer(r"\S+|\s+", [bytes([byte]) for byte in range(256)]), folder / "tokenizer")
    sources = [{"name": "wiki", "category": "web", "package": "p", "version": "1", "licence": "CC BY-SA 4.0"}]
    (folder / "manifest.json").write_text(json.dumps({"sources": sources}))
    return folder


def write_checkpoint(folder: Path, tokenizer: Path | None) -> Path:
    model = HybridModel(CONFIG)
    model.init_weights(5)
    provenance = Provenance(stage="sft", seed=9, step=4, tokens_seen=77, metrics={"final_loss": 1.5})
    save_model(model, folder, tokenizer_from=tokenizer, provenance=provenance)
    return folder


@pytest.fixture
def source(tmp_path: Path, data: Path) -> Path:
    return write_checkpoint(tmp_path / "sft" / "hf", data / "tokenizer")


def run_with(tmp_path: Path, inputs: dict[str, Path]) -> Run:
    return Run("quickstart", "export", tmp_path, 9, EngineConfig(), TrackingConfig(), inputs)


def write_record(entry: Path, stage: str, product: str, inputs: dict, results: dict, digest: str = "x") -> None:
    entry.mkdir(exist_ok=True)
    record = {"stage": stage, "product": product, "product_digest": digest, "inputs": inputs}
    (entry / "stage.json").write_text(json.dumps(record))
    (entry / "results.json").write_text(json.dumps(results))


@pytest.mark.parametrize("dtype", list(SaveDtype))
def test_export_writes_a_verified_folder(tmp_path: Path, source: Path, dtype: SaveDtype) -> None:
    run = run_with(tmp_path, {"init_from": source})
    folder = export(ExportConfig(save_dtype=dtype), run)
    assert folder == tmp_path / "export" / "hf"
    wanted = torch.float32 if dtype is SaveDtype.float32 else torch.bfloat16
    before, after = load_state_dict(source), load_state_dict(folder)
    for name, tensor in before.items():
        keeps_fp32 = name.endswith((".A_log", ".D", ".dt_bias"))
        assert after[name].dtype == (torch.float32 if keeps_fp32 else wanted)
        assert after[name].equal(tensor.to(after[name].dtype))
    results = json.loads((run.folder / "results.json").read_text())
    assert results["dtype"] == dtype.value
    assert results["weight_bytes"] == (folder / "model.safetensors").stat().st_size
    assert results["verification"]["max_abs_logit_difference"] < 1e-4
    assert results["verification"]["tokens_checked"] > 0
    assert load_config(folder) == CONFIG


def test_transformers_loads_it_with_tokenizer_and_template(tmp_path: Path, source: Path) -> None:
    folder = export(ExportConfig(), run_with(tmp_path, {"init_from": source}))
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    messages = [{"role": "user", "content": "Add 1 and 2."}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert text == chat.render(messages, add_generation_prompt=True, thinking=True)
    ids = torch.tensor([tokenizer.encode(text, add_special_tokens=False)])
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True)
    with torch.no_grad():
        assert torch.allclose(model(ids).logits, load_model(folder)(ids), atol=1e-4)
    assert model.generation_config.eos_token_id == [2, 11, 12]


def test_provenance_names_the_parent_and_keeps_its_numbers(tmp_path: Path, source: Path) -> None:
    folder = export(ExportConfig(), run_with(tmp_path, {"init_from": source}))
    provenance = load_provenance(folder)
    assert provenance is not None
    assert (provenance.stage, provenance.tokens_seen, provenance.step, provenance.seed) == ("export", 77, 4, 9)
    assert provenance.metrics == {"final_loss": 1.5}
    assert provenance.parent_digest == folder_digest(source)


def test_card_tells_the_whole_way(tmp_path: Path, source: Path, data: Path) -> None:
    held_out = {"bits_per_byte": {"web": 2.25}, "average": 2.25, "loss": 4.0}
    training = {"parameters": 10, "steps": 3, "tokens": 4096, "final_loss": 3.25, "held_out": held_out}
    from_data = {"data_from": {"path": str(data), "digest": "d", "entry": "prepare"}}
    write_record(tmp_path / "sft", "SftConfig", "hf", from_data, training, digest="tuned")
    one = {"accuracy": 0.5, "count": 8, "interval": [0.2, 0.8], "by_task": {}}
    point = {"budget": None, "accuracy": 0.5, "well_formed": 1.0, "answer_tokens": 6.25}
    results = {"held_out": held_out, "tasks": {"reasoning_on": one}, "budget_curve": [point]}
    judged = {"init_from": {"path": str(source), "digest": "tuned", "entry": "sft"}}
    write_record(tmp_path / "evaluate", "EvaluateConfig", "evaluation.json", judged, results)
    card = (export(ExportConfig(), run_with(tmp_path, {"init_from": source})) / "README.md").read_text()
    assert "# quickstart\n" in card
    assert "| sft | 10 | 3 | 4096 | 3.25 | 2.25 |" in card
    assert "50.0% (8 prompts, 95% interval 20-80%)" in card
    assert "| unlimited | 50.0% | 100.0% | 6.2 |" in card
    assert "| wiki | web | p | 1 | CC BY-SA 4.0 |" in card
    assert "## Limits" in card and "## Verification" in card and "AutoModelForCausalLM" in card
    assert str(tmp_path) not in card.split("## Origin")[0]


def test_a_killed_attempt_is_written_again(tmp_path: Path, source: Path) -> None:
    run = run_with(tmp_path, {"init_from": source})
    first = folder_digest(export(ExportConfig(), run))
    (run.folder / "hf" / "config.json").write_text("{")
    assert folder_digest(export(ExportConfig(), run)) == first


def test_tokenizer_comes_from_the_data_when_the_checkpoint_has_none(tmp_path: Path, data: Path) -> None:
    bare = write_checkpoint(tmp_path / "bare" / "hf", None)
    with pytest.raises(MissingInputError, match=r"holds no tokenizer\.json; set `stage\.data_from`"):
        export(ExportConfig(), run_with(tmp_path, {"init_from": bare}))
    inputs = {"init_from": bare, "data_from": data}
    folder = export(ExportConfig(data_from="prepare"), run_with(tmp_path, inputs))
    assert load_tokenizer(folder).get_vocab() == load_tokenizer(data / "tokenizer").get_vocab()


def test_command_line_form_overwrites_nothing(tmp_path: Path, source: Path) -> None:
    output = tmp_path / "out"
    verification = export_folder(source, output, "float32")
    assert verification["max_abs_logit_difference"] < 1e-4
    assert "# out\n" in (output / "README.md").read_text()
    before = folder_digest(output)
    with pytest.raises(UserError, match="exists and is not overwritten"):
        export_folder(source, output, "float32")
    with pytest.raises(UserError, match="exists and is not overwritten"):
        export_folder(source, source, "float32")
    assert folder_digest(output) == before


def test_bad_arguments_write_nothing(tmp_path: Path, source: Path) -> None:
    with pytest.raises(UserError, match=r"dtype \(float16\) must be one of"):
        export_folder(source, tmp_path / "out", "float16")
    with pytest.raises(UserError):
        export_folder(tmp_path / "nothing", tmp_path / "out", "float32")
    assert not (tmp_path / "out").exists()
