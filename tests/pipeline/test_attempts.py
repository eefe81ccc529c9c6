import json
import time

import numpy as np
import pytest

from nanotrain.pipeline import attempts as module
from nanotrain.pipeline.attempts import attempt, load_attempts


def test_seconds_accumulate_and_a_heartbeat_survives_a_kill(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "HEARTBEAT_SECONDS", 0.02)
    with pytest.raises(ZeroDivisionError), attempt(tmp_path, "f"):
        time.sleep(0.15)
        seen = json.loads((tmp_path / "attempts.json").read_text())  # what a kill at this moment would leave
        assert 0.05 < seen["seconds"][0] < 0.5 and seen["fingerprint"] == "f"
        raise ZeroDivisionError
    with attempt(tmp_path, "f") as account:
        time.sleep(0.05)
    assert len(account.seconds) == 2 and account.seconds[0] >= 0.15 and account.seconds[1] >= 0.05
    assert load_attempts(tmp_path) == account


def test_another_fingerprint_starts_a_new_account(tmp_path):
    with attempt(tmp_path, "f"):
        pass
    with attempt(tmp_path, "g") as account:
        pass
    assert account.fingerprint == "g" and len(account.seconds) == 1


def test_peak_memory_is_that_of_the_largest_attempt(tmp_path):
    with attempt(tmp_path, "f") as account:
        block = np.ones(40_000_000)
        assert block.sum() > 0
        del block
    large = account.peak_memory_bytes
    with attempt(tmp_path, "f") as account:
        pass
    assert large > 320e6 and account.peak_memory_bytes == large


def test_a_damaged_account_is_none(tmp_path):
    (tmp_path / "attempts.json").write_text("{")
    assert load_attempts(tmp_path) is None
