from pathlib import Path

from nanotrain.checkpoint.model_card import write_model_card
from nanotrain.checkpoint.provenance import Provenance, save_provenance
from nanotrain.config.model import ModelConfig
from nanotrain.planning.parameters import count_parameters


def test_card_says_what_the_model_is_and_where_it_comes_from(folder: Path, config: ModelConfig) -> None:
    first = (folder / "README.md").read_text()
    assert f"{count_parameters(config):,}" in first and "2 Mamba-2, 1 attention, 1 MLP" in first
    changes = {"time_step_min": {"from": 0.001, "to": 1e-9, "why": "because"}}
    save_provenance(folder, Provenance("sft", parent="runs/x", metrics={"bits": 1.23456789}, config_changes=changes))
    write_model_card(folder, title="toy: sft", facts={"training steps": 12, "loss": 2.0000001})
    card = (folder / "README.md").read_text()
    for part in ("# toy: sft", "| training steps | 12 |", "| loss | 2 |", "| parent | runs/x |", "1.23457", "because"):
        assert part in card, part
