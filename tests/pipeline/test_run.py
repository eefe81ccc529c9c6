import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from nanotrain.config.errors import UserError
from nanotrain.pipeline.products import load_record
from nanotrain.pipeline.run import run_pipeline
from nanotrain.runtime.files import folder_digest
from tests.pipeline.fake_stages import ITEMS, FakeStages, build_report

ENTRIES = ["prepare", "pretrain", "prune", "distill", "evaluate"]
RUN = Path("runs/toy")


def start(recipe, **options) -> FakeStages:
    fakes = FakeStages()
    run_pipeline(recipe, fakes.table, report=build_report, **options)
    return fakes


def tree(folder: Path) -> dict[str, tuple[int, bytes]]:
    return {str(p): (p.stat().st_mtime_ns, p.read_bytes()) for p in folder.rglob("*") if p.is_file()}


def test_every_entry_gets_its_inputs_and_a_record(load):
    fakes = start(load("pipeline"))
    assert fakes.calls == ENTRIES
    inputs = {name: {key: str(path) for key, path in run.inputs.items()} for name, run in fakes.runs.items()}
    assert inputs == {
        "prepare": {},
        "pretrain": {"data_from": "runs/toy/prepare/data"},
        "prune": {"init_from": "runs/toy/pretrain/hf", "data_from": "runs/toy/prepare/data"},
        "distill": {
            "init_from": "runs/toy/prune/hf",
            "teacher_from": "runs/toy/pretrain/hf",
            "data_from": "runs/toy/prepare/data",
        },
        "evaluate": {"init_from": "runs/toy/distill/hf", "data_from": "runs/toy/prepare/data"},
    }
    record = json.loads((RUN / "distill" / "stage.json").read_text())
    assert record["product"] == "hf" and record["kind"] == "checkpoint" and record["stage"] == "DistillConfig"
    assert record["product_digest"] == folder_digest(RUN / "distill" / "hf")
    assert record["inputs"]["teacher_from"]["digest"] == folder_digest(RUN / "pretrain" / "hf")
    assert record["seconds"] > 0 and record["peak_memory_bytes"] > 1e6


def test_only_one_entry_runs_once_its_inputs_are_finished(load):
    recipe = load("pipeline")
    with pytest.raises(UserError, match=r"`--only prune` starts from 'pretrain' .*`--only pretrain` first"):
        start(recipe, only="prune")
    with pytest.raises(UserError, match=r"`--only prun` names no entry of this run"):
        start(recipe, only="prun")
    assert not RUN.exists()
    for name in ENTRIES:
        assert start(recipe, only=name).calls == [name]
        assert start(recipe, only=name).calls == []
    assert start(recipe).calls == []
    assert start(recipe, only="prune", force="prune").calls == ["prune"]


def test_finished_run_does_no_work_and_changes_no_byte(load):
    start(load("pipeline"))
    before = tree(RUN)
    fakes = FakeStages()

    def refuse(*_):
        raise AssertionError("a finished run must not load stages or write the report")

    run_pipeline(load("pipeline"), refuse, report=refuse)
    after = tree(RUN)
    lock = str(RUN / ".lock")
    assert {k: v for k, v in after.items() if k != lock} == {k: v for k, v in before.items() if k != lock}
    assert fakes.calls == []


def test_a_missing_report_is_written_again_without_running_a_stage(load):
    start(load("pipeline"))
    (RUN / "report.json").unlink()
    assert start(load("pipeline")).calls == []
    assert (RUN / "report.json").is_file()


@pytest.mark.parametrize(
    ("override", "stale"),
    [
        ("distill.stage.training.steps=4", "distill"),
        ("seed=2", "prepare"),
        ("prepare.stage.corpus.num_chat_rows=7", "prepare"),
        ("engine.precision=bf16", "prepare"),
    ],
)
def test_a_changed_recipe_names_the_stale_product_and_force_makes_it_again(load, override, stale):
    start(load("pipeline"))
    before = tree(RUN)
    with pytest.raises(
        UserError, match=rf"runs/toy/{stale} is stale.*{override.split('.')[-1].split('=')[0]}.*--force"
    ):
        start(load("pipeline", override))
    assert tree(RUN) == before
    fakes = start(load("pipeline", override), force=True)
    assert fakes.calls == ENTRIES[ENTRIES.index(stale) :]
    assert start(load("pipeline", override)).calls == []


def test_what_does_not_change_the_product_does_not_make_it_stale(load):
    start(load("pipeline"))
    same = [
        "engine.threads=2",
        "tracking=wandb",
        "name=renamed",
        "output_dir=runs/toy",
        "distill.stage.init_from=prune",
    ]
    assert start(load("pipeline", *same)).calls == []
    shutil.copytree(RUN, "elsewhere/toy")  # new times, same bytes
    assert start(load("pipeline", "output_dir=elsewhere/toy")).calls == []


def test_force_of_one_entry_makes_it_again_and_keeps_what_does_not_change(load):
    start(load("pipeline"))
    assert start(load("pipeline"), force="prune").calls == ["prune"]  # equal bytes: the later entries stay fresh
    changed = load("pipeline", "prune.stage.calibration_samples=3")
    assert start(changed, force="prune").calls == ["prune", "distill", "evaluate"]
    with pytest.raises(UserError, match=r"prun.*did you mean 'prune'"):
        start(load("pipeline"), force="prun")
    with pytest.raises(UserError, match="runs/toy/prepare is stale"):
        start(load("pipeline", "seed=5"), force="distill")


def test_a_new_entry_of_the_same_pipeline_joins_the_run(load, folder):
    file = folder / "family" / "pipeline.yaml"
    whole = file.read_text()
    file.write_text("".join(line for line in whole.splitlines(True) if "evaluate" not in line))
    start(load("pipeline"))
    file.write_text(whole)
    assert start(load("pipeline")).calls == ["evaluate"]


def test_one_stage_alone_continues_the_pipeline_and_the_other_way_round(load):
    for name in ENTRIES[:3]:
        assert start(load(name)).calls == [name]
    assert start(load("pipeline")).calls == ["distill", "evaluate"]
    assert start(load("distill")).calls == []


@pytest.mark.parametrize(
    ("file", "harm"),
    [
        ("hf/model.safetensors", "change"),
        ("hf/deep/weights.safetensors", "truncate"),
        ("hf/model.safetensors", "remove"),
        ("hf/config.json", "remove"),
    ],
)
def test_a_product_changed_by_hand_is_named(load, file, harm):
    start(load("pipeline"))
    path = RUN / "prune" / file
    if harm == "remove":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:-1] + (b"!" if harm == "change" else b""))
    with pytest.raises(UserError, match=rf"runs/toy/prune/{file} was changed or removed.*--force prune"):
        start(load("pipeline"))
    with pytest.raises(UserError, match=rf"runs/toy/prune/hf.*({Path(file).name} was changed or removed|it has no)"):
        start(
            load(
                "distill",
                "stage.training.steps=9",
                "output_dir=runs/other",
                "stage.init_from=runs/toy/prune/hf",
                "stage.teacher_from=runs/toy/pretrain",
                "stage.data_from=runs/toy/prepare",
            )
        )
    assert not Path("runs/other").exists()
    assert start(load("pipeline"), force=True).calls == ["prune"]


def test_a_change_that_keeps_size_and_time_is_found_when_the_product_is_used(load):
    start(load("prepare"))
    path = RUN / "prepare/data/model.safetensors"
    times = path.stat()
    path.write_bytes(path.read_bytes()[:-1] + b"!")
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    with pytest.raises(UserError, match=r"stage\.data_from.*model\.safetensors was changed"):
        start(load("pretrain"))


def test_an_added_or_a_removed_product_is_noticed(load):
    start(load("pipeline"))
    (RUN / "prune/hf/extra.bin").write_text("x")
    with pytest.raises(UserError, match=r"hf/extra\.bin was changed"):
        start(load("pipeline"))
    shutil.rmtree(RUN / "prune/hf")
    with pytest.raises(UserError, match="runs/toy/prune/hf was changed or removed"):
        start(load("pipeline"))


def test_damaged_records_are_named(load):
    start(load("pipeline"))
    (RUN / "prune/stage.json").write_text('{"fingerprint": ')
    with pytest.raises(UserError, match=r"runs/toy/prune/stage\.json is damaged"):
        start(load("pipeline"))
    (RUN / "run.json").write_text("[]")
    with pytest.raises(UserError, match=r"runs/toy/run\.json is damaged"):
        start(load("pipeline"))


class Cut(Exception):
    pass


def cut_off(recipe, entry: str, leave_work: bool = True) -> None:
    fakes = FakeStages()

    def table():
        def stage(config, run):
            if run.entry != entry:
                return fakes._stage(config, run)
            if leave_work:
                (run.folder / "state").mkdir()
            raise Cut

        return dict.fromkeys(fakes.table(), stage)

    with pytest.raises(Cut):
        run_pipeline(recipe, table, report=build_report)


def test_unfinished_work_resumes_and_that_of_another_recipe_is_refused(load):
    cut_off(load("pipeline"), "prune")
    with pytest.raises(
        UserError, match=r"unfinished work in runs/toy/prune belongs to another recipe .*calibration_sam"
    ):
        start(load("pipeline", "prune.stage.calibration_samples=5"))
    fakes = start(load("pipeline"))
    assert fakes.calls == ["prune", "distill", "evaluate"]
    assert (RUN / "prune/state").is_dir()
    attempts = json.loads((RUN / "prune/attempts.json").read_text())
    assert len(attempts["seconds"]) == 2
    record = load_record(RUN / "prune")
    assert record is not None and record.seconds == pytest.approx(sum(attempts["seconds"]), abs=0.01)


def test_a_start_that_left_no_work_does_not_bind(load):
    cut_off(load("pipeline"), "prune", leave_work=False)
    assert "prune" in start(load("pipeline", "prune.stage.calibration_samples=5")).calls


def test_force_discards_the_unfinished_work_of_another_recipe_but_resumes_its_own(load):
    cut_off(load("pipeline"), "prune")
    start(load("pipeline", "prune.stage.calibration_samples=5"), force="prune")
    assert not (RUN / "prune/state").exists()
    shutil.rmtree("runs")
    cut_off(load("pipeline"), "prune")
    start(load("pipeline"), force="prune")
    assert (RUN / "prune/state").is_dir()


def test_an_entry_folder_that_no_run_left_is_refused(load):
    start(load("prepare"))
    (RUN / "pretrain").mkdir()
    (RUN / "pretrain/notes.txt").write_text("mine")
    with pytest.raises(UserError, match=r"runs/toy/pretrain holds 'notes\.txt'"):
        start(load("pipeline"))


def run_program(folder: Path, output: str, seconds: float) -> subprocess.Popen:
    program = Path(__file__).with_name("fake_stages.py")
    command = [sys.executable, str(program), "family/pipeline.yaml", str(seconds), f"output_dir={output}"]
    return subprocess.Popen(command, cwd=folder, stderr=subprocess.DEVNULL)


def items_done(run: Path) -> int:
    """Return how many work items of a run's entries are finished."""
    done = 0
    for name in ENTRIES:
        progress = run / name / "progress.jsonl"
        if (run / name / "stage.json").exists():
            done += ITEMS
        elif progress.exists():
            done += len(progress.read_bytes().splitlines())
    return done


def kill_after(process: subprocess.Popen, run: Path, items: int, seconds: float) -> bool:
    """Kill a run so long after it has finished so many items; return whether it was still there."""
    while items_done(run) < items and process.poll() is None:
        time.sleep(0.005)
    try:
        process.wait(timeout=seconds)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGKILL)
        return process.wait() == -signal.SIGKILL
    return False


def test_killed_at_any_moment_the_same_command_ends_in_the_same_products(folder):
    """Kills wait for work, not for the clock: a loaded machine gets as many, and no run is starved."""
    started = time.monotonic()
    assert run_program(folder, "calm", 0.0).wait() == 0
    start_seconds = time.monotonic() - started
    chance, kills = random.Random(0), 0
    killed = kill_after(run_program(folder, "stormy", 0.05), folder / "stormy", 0, start_seconds * chance.random() / 2)
    while items_done(folder / "stormy") < ITEMS * len(ENTRIES):
        items = items_done(folder / "stormy") + chance.randint(1, 5)
        process = run_program(folder, "stormy", 0.05)
        if kill_after(process, folder / "stormy", items, 0.1 * chance.random()):
            kills += 1
        else:
            assert process.returncode == 0
    assert run_program(folder, "stormy", 0.05).wait() == 0
    assert killed and kills >= 2
    for name in ENTRIES:
        for file in ("results.json", "recipe.yaml"):
            calm, stormy = ((folder / run / name / file).read_text() for run in ("calm", "stormy"))
            assert calm.replace("calm", "stormy") == stormy
        records = [load_record(folder / run / name) for run in ("calm", "stormy")]
        assert records[0] and records[1] and records[0].product_digest == records[1].product_digest
    assert (folder / "calm/report.json").read_text() == (folder / "stormy/report.json").read_text()
    leftovers = [p.name for p in (folder / "stormy").rglob(".*") if p.name != ".lock"]
    assert leftovers == []


def test_two_processes_do_not_run_in_one_folder_and_a_dead_ones_lock_is_void(folder, load):
    process = run_program(folder, "shared", 300)  # in its first item for as long as this test takes
    try:
        deadline = time.monotonic() + 120
        while not (folder / "shared/prepare").exists():
            assert time.monotonic() < deadline
            time.sleep(0.02)
        with pytest.raises(UserError, match=rf"shared\) is in use by process {process.pid}"):
            start(load("pipeline", "output_dir=shared"))
    finally:
        process.kill()
        process.wait()
    assert start(load("pipeline", "output_dir=shared")).calls[-1] == "evaluate"
