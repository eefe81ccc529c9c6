import json
from pathlib import Path

import pytest

from nanotrain.checkpoint.provenance import PROVENANCE_FILE, Provenance, load_provenance, save_provenance
from nanotrain.config.errors import UserError


def test_round_trip(tmp_path: Path) -> None:
    assert load_provenance(tmp_path) is None
    provenance = Provenance(
        "sft", parent="runs/a/distill/hf", parent_digest="ab", seed=3, step=7, tokens_seen=99, metrics={"loss": 1.5}
    )
    save_provenance(tmp_path, provenance)
    assert load_provenance(tmp_path) == provenance
    assert provenance.package_version


def test_keys_of_a_newer_version_are_ignored(tmp_path: Path) -> None:
    (tmp_path / PROVENANCE_FILE).write_text(json.dumps({"stage": "x", "colour": "blue"}))
    loaded = load_provenance(tmp_path)
    assert loaded is not None and loaded.stage == "x"


@pytest.mark.parametrize("content", [b"{", b"\xff", b"[]", b'{"step": 1}', b'{"stage": 3}'])
def test_corrupt_file(tmp_path: Path, content: bytes) -> None:
    (tmp_path / PROVENANCE_FILE).write_bytes(content)
    with pytest.raises(UserError, match=PROVENANCE_FILE):
        load_provenance(tmp_path)
