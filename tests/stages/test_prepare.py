import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from nanotrain.config.data import CorpusConfig
from nanotrain.config.engine import EngineConfig, TrackingConfig
from nanotrain.config.errors import UserError
from nanotrain.config.stage import PrepareConfig
from nanotrain.data import corpus
from nanotrain.data.manifest import DataFolder
from nanotrain.runtime.files import file_digest, folder_digest
from nanotrain.runtime.run import Run
from nanotrain.stages.prepare import prepare

FAKES = Path(__file__).parents[1] / "data" / "fake_packages.py"
CONFIG = PrepareConfig(
    corpus=CorpusConfig(vocab_size=1280, validation_fraction=0.15, num_chat_rows=60, num_chat_validation_rows=20)
)

# A process of its own, so that it can be killed: argv = fakes, wheel folder, output folder.
PROGRAM = """
import importlib.util, sys
from pathlib import Path
spec = importlib.util.spec_from_file_location("fakes", sys.argv[1])
fakes = importlib.util.module_from_spec(spec); spec.loader.exec_module(fakes)
from nanotrain.config.data import CorpusConfig
from nanotrain.config.engine import EngineConfig, TrackingConfig
from nanotrain.config.stage import PrepareConfig
from nanotrain.data import corpus
from nanotrain.runtime.run import Run
from nanotrain.stages.prepare import prepare
wheels = fakes.make_wheels(Path(sys.argv[2]), fakes.byte_tekken())
corpus.ensure_wheels = lambda packages, folder: wheels
config = PrepareConfig(corpus=CorpusConfig(vocab_size=1280, validation_fraction=0.15, num_chat_rows=60,
                                           num_chat_validation_rows=20))
print("ready", flush=True)
prepare(config, Run("t", "prepare", Path(sys.argv[3]), 1, EngineConfig(), TrackingConfig()))
"""


def run_of(folder: Path, seed: int = 1) -> Run:
    return Run("t", "prepare", folder, seed, EngineConfig(), TrackingConfig())


@pytest.fixture(scope="module")
def wheels(tmp_path_factory):
    spec = importlib.util.spec_from_file_location("fakes", FAKES)
    fakes = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(fakes)
    return fakes.make_wheels(tmp_path_factory.mktemp("wheels"), fakes.byte_tekken())


def test_leaves_a_checked_data_folder_and_its_numbers(tmp_path, wheels, monkeypatch):
    monkeypatch.setattr(corpus, "ensure_wheels", lambda packages, folder: wheels)
    data = prepare(CONFIG, run_of(tmp_path))
    assert data == tmp_path / "prepare/data"
    folder = DataFolder(data)
    for name in folder.manifest["files"]:
        folder.file(name)
    results = json.loads((tmp_path / "prepare/results.json").read_text())
    assert results["manifest_digest"] == file_digest(data / "manifest.json")
    assert set(results) == {"categories", "chat", "manifest_digest", "tokenizer_digest"}
    other = prepare(CONFIG, run_of(tmp_path / "other", seed=2))  # the text does not depend on the run's seed
    assert folder_digest(other) == folder_digest(data)


def test_killed_at_any_moment_it_resumes_to_the_same_bytes(tmp_path, wheels, monkeypatch):
    monkeypatch.setattr(corpus, "ensure_wheels", lambda packages, folder: wheels)
    expected = folder_digest(prepare(CONFIG, run_of(tmp_path / "whole")))
    command = [sys.executable, "-c", PROGRAM, str(FAKES), str(tmp_path / "w"), str(tmp_path / "cut")]
    for delay in (0.05, 0.4):
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        assert process.stdout.readline() == b"ready\n"
        time.sleep(delay)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    data = prepare(CONFIG, run_of(tmp_path / "cut"))
    assert folder_digest(data) == expected
    assert not [path for path in (tmp_path / "cut").rglob("*") if path.name.endswith(".tmp")]


def test_an_empty_cache_without_packages_is_one_sentence(tmp_path, monkeypatch):
    monkeypatch.setenv("NANOTRAIN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    with pytest.raises(UserError, match=r"is not in the cache.*data_prep\.download.*NANOTRAIN_CACHE"):
        prepare(CONFIG, run_of(tmp_path))
