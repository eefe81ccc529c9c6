"""Runs on several ranks that are killed, signalled and lied to by the disk: the end is that of an undisturbed run.

The short form takes seconds. The long one (`-m slow`) kills more than 200 times over all stages and engines on 2 and 4 ranks
and prints its account; docs/benchmarks has one.
"""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import pytest

from nanotrain.checkpoint.resume import find_defect, latest_resume_state, list_states
from tests.end_to_end.campaign import LONG_FORM, Campaign, rows_of, table
from tests.end_to_end.rank_engines import ENGINES
from tests.end_to_end.ranks_of_a_run import (
    RECIPE,
    ROOT,
    Ranks,
    make_wheels,
    settings,
    short_settings,
    write_short_pipeline,
)

pytestmark = pytest.mark.xdist_group("faults")  # one worker: the warm process and the undisturbed run are made once
STEPS = 5


@pytest.fixture(scope="module")
def wheels(tmp_path_factory) -> dict[str, Path]:
    return make_wheels(tmp_path_factory.mktemp("wheels"))


@pytest.fixture(scope="module")
def short(wheels, tmp_path_factory) -> Campaign:
    """Prepare, pretrain and export on two ranks; the undisturbed run is there."""
    folder = tmp_path_factory.mktemp("short")
    return Campaign(["run", write_short_pipeline(folder), *short_settings(STEPS)], 2, wheels, folder)


def test_killed_at_random_moments_two_ranks_end_in_the_same_bytes(short):
    outcome = short.run(kills=3)
    assert outcome.kills >= 3 and outcome.runs >= 1
    assert outcome.longest_end_seconds < 60


def test_every_damage_to_a_real_state_is_found_and_the_state_before_it_is_used(short, tmp_path):
    """50 flipped bits and truncations in the files that two ranks wrote."""
    states = list_states(short._folder / "calm/pretrain/state")
    assert len(states) == 2
    chance = random.Random(1)
    for number in range(50):
        root = tmp_path / str(number)
        shutil.copytree(states[0][1].parent, root)
        newest = root / states[-1][1].name
        victim = chance.choice(sorted(path for path in newest.rglob("*") if path.is_file()))
        content = bytearray(victim.read_bytes())
        if chance.random() < 0.3:
            content = content[: chance.randrange(len(content))]
        else:
            content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
        victim.write_bytes(content)
        assert find_defect(newest) is not None, victim.name
        found = latest_resume_state(root)
        assert found is not None and found[1]["step"] == states[0][0]
        shutil.rmtree(root)


def start_pretraining(short: Campaign, output: Path, steps: int, size: int = 2) -> Ranks:
    """Start a training of many steps in a folder of its own, and return when it has saved a state."""
    data = short._folder / "calm/prepare/data"
    own = [text.removeprefix("pretrain.") for text in short_settings(steps) if text.split(".")[0] in ("pretrain",)]
    recipe = str(Path(RECIPE).with_name("pretrain.yaml"))
    arguments = ["run", recipe, "engine=torch_cpu", "engine.threads=1", *own, f"stage.data_from='{data}'"]
    ranks = Ranks([*arguments, f"output_dir='{output}'"], size, short._wheels, output.with_name("logs"))
    deadline = time.monotonic() + 60
    while not list_states(output / "pretrain/state"):
        assert time.monotonic() < deadline and not ranks.any_ended(), ranks.output[-3000:]
        time.sleep(0.02)
    return ranks


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_to_one_rank_saves_and_ends_all_of_them(short, tmp_path, number):
    ranks = start_pretraining(short, tmp_path / "run", 100_000)
    try:
        ranks.signal(number, rank=1)
        assert ranks.wait(30) == [75, 75], ranks.output[-3000:]
    finally:
        ranks.kill()
    said = [line for line in ranks.output.splitlines() if line.startswith("nanotrain: ")]
    assert len(said) == 1 and "saved at step" in said[0]
    step = int(said[0].rsplit("saved at step ", 1)[1].split(";")[0])
    assert list_states(tmp_path / "run/pretrain/state")[-1][0] == step
    lines = (tmp_path / "run/pretrain/metrics.jsonl").read_text().splitlines()
    assert json.loads(lines[-1])["step"] == step


def test_a_rank_that_dies_takes_the_others_with_it(short, tmp_path):
    """Without an agent that ends them: the closed connection is enough."""
    ranks = start_pretraining(short, tmp_path / "run", 100_000)
    try:
        ranks.signal(signal.SIGKILL, rank=1)
        codes = ranks.wait(60)
    finally:
        ranks.kill()
    assert codes is not None and codes[1] == -9 and codes[0] == 1


def test_a_mistake_is_said_once_and_every_rank_ends_with_it(short, tmp_path):
    arguments = ["run", RECIPE, *settings(2, 1e9), "pretrain.stage.training.stepz=1"]
    ranks = Ranks(arguments, 2, short._wheels, tmp_path)
    try:
        assert ranks.wait(30) == [2, 2]
    finally:
        ranks.kill()
    assert ranks.output.count("nanotrain: ") == 1 and "stepz" in ranks.output


def test_two_ranks_prove_their_resume_on_a_recipe_of_the_user(short, tmp_path):
    data = short._folder / "calm/prepare/data"
    own = [text.removeprefix("pretrain.") for text in short_settings(STEPS) if text.startswith("pretrain.")]
    recipe = str(Path(RECIPE).with_name("pretrain.yaml"))
    arguments = [
        "run",
        recipe,
        "engine=torch_cpu",
        *own,
        f"stage.data_from='{data}'",
        f"output_dir='{tmp_path / 'run'}'",
    ]
    ranks = Ranks([*arguments, "--resume-check", "4"], 2, short._wheels, tmp_path / "logs")
    try:
        assert ranks.wait(60) == [0, 0], ranks.output[-3000:]
    finally:
        ranks.kill()
    assert ranks.output.count("pretrain: resumed after step 2 of 4, equal bit for bit") == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(("configuration", "kills"), LONG_FORM.items())
def test_two_hundred_kills_over_all_stages_and_engines(tmp_path, configuration, kills, capsys):
    library = ENGINES[configuration.split(":")[0]].library
    if library is not None and find_spec(library) is None:
        pytest.skip(f"{library} is not installed")
    account = tmp_path / "account.jsonl"
    command = [sys.executable, "-m", "tests.end_to_end.campaign", str(account), f"{configuration}:{kills}"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-12000:]
    with capsys.disabled():
        print(f"\n{table(rows_of(account))}")
    assert sum(row["kills"] for row in rows_of(account)) >= kills


def test_the_long_form_kills_two_hundred_times_on_two_to_four_ranks():
    assert sum(LONG_FORM.values()) >= 200
    assert {int(configuration.split(":")[1]) for configuration in LONG_FORM} == {2, 4}
