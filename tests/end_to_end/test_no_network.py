"""A user without network: a run tries to reach nothing outside this machine, with any tracker in its default mode.

Two guards, over the process and all its children: Python's audit events, and system calls under strace, which native
libraries (wandb's own service) cannot slip past. A child that does connect shows that both would see it.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest

from nanotrain.cli import main
from nanotrain.data import corpus
from tests.data.fake_packages import byte_tekken, make_wheels
from tests.end_to_end.test_pipeline import OVERRIDES

ROOT = Path(__file__).parents[2]
OTHERS = ("trackio", "tensorboard")
NET_CALLS = "connect,sendto,sendmsg,sendmmsg"
_ADDRESS = re.compile(r'sin6?_port=htons\((\d+)\).*?(?:inet_addr\("([^"]+)"|inet_pton\(AF_INET6, "([^"]+)")')


def watched(folder: Path, *command: str) -> tuple[list[str], list[str] | None]:
    """Run a Python command to its end; return what either guard saw going out, None where strace is missing."""
    seen, trace = folder / "seen.txt", folder / "strace.txt"
    seen.touch()
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "WANDB_"))}
    environment |= {
        "PYTHONPATH": f"{ROOT}/tests/end_to_end/watched:{ROOT}",
        "WATCH_FILE": str(seen),
        "OMP_NUM_THREADS": "1",
        "HF_TOKEN": "hf_not_a_token",  # with a token, libraries would ask the hub whose it is
        "TRACKIO_DIR": str(folder / "trackio_data"),
        "TRACKIO_SPACE_ID": "someone/somewhere",
    }
    strace = shutil.which("strace")
    tracer = [strace, "-f", "-qq", "--seccomp-bpf", "-e", f"trace={NET_CALLS}", "-o", str(trace)] if strace else []
    done = subprocess.run(
        [*tracer, sys.executable, *command], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return seen.read_text().splitlines(), outgoing(trace.read_text()) if strace else None


def outgoing(trace: str) -> list[str]:
    """Return the calls of strace's output that name an address beyond loopback, or any name server."""
    found = []
    for line in trace.splitlines():
        match = _ADDRESS.search(line)
        if match is None:
            continue
        port, address = match[1], match[2] or match[3]
        if port == "53" or not (address.startswith("127.") or address == "::1"):
            found.append(line)
    return found


CALLS_OUT = """\
import socket
with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as s:
    s.connect(("192.0.2.1", 9))  # a documentation address; connecting a datagram socket sends nothing
"""


def test_the_guards_see_a_connection(tmp_path):
    python_saw, kernel_saw = watched(tmp_path, "-c", CALLS_OUT)
    assert len(python_saw) == 1 and "192.0.2.1" in python_saw[0]
    assert kernel_saw is None or len(kernel_saw) == 1
    local = 'connect(3, {sa_family=AF_INET, sin_port=htons(%d), sin_addr=inet_addr("127.0.0.53")}, 16) = 0'
    assert outgoing(local % 53) and not outgoing(local % 80)


TRACKERS = """\
import pathlib, sys
from nanotrain.config.engine import TrackerKind, TrackingConfig
from nanotrain.runtime.tracking import build_tracker
for kind in TrackerKind:
    tracker = build_tracker(TrackingConfig(kind=kind), pathlib.Path(sys.argv[1]) / kind.value / "pretrain", "run", {})
    tracker.log(1, {"loss": 1.0})
    tracker.close()
"""


def test_every_tracker_reaches_for_nothing(tmp_path):
    python_saw, kernel_saw = watched(tmp_path, "-c", TRACKERS, str(tmp_path))
    check(tmp_path, python_saw, kernel_saw)


def check(folder: Path, python_saw: list[str], kernel_saw: list[str] | None) -> None:
    """Assert that the trackers wrote, and that neither guard saw anything."""
    assert python_saw == []
    for kind, files in (("wandb", "run-*.wandb"), ("tensorboard", "events.out.tfevents.*")):
        assert list((folder / kind / "pretrain").rglob(files)), kind
    assert list((folder / "trackio_data").rglob("*.db"))
    if kernel_saw is None:
        pytest.skip("strace is not installed: Python's calls were watched, those of native libraries were not")
    assert kernel_saw == []


RUNS = """\
import json, sys
from nanotrain.cli import main
sys.exit(max(main(command) for command in json.loads(sys.argv[1])))
"""
PIPELINE = """\
name: offline
pipeline:
  - {{name: pretrain, recipe: {0}/pretrain.yaml}}
  - {{name: export, recipe: {0}/export.yaml}}
"""


@pytest.mark.slow
def test_a_pipeline_with_every_tracker_reaches_for_nothing(tmp_path):
    """Preparing data is not watched: made-up texts stand in for what a user has downloaded."""
    chosen = [text for text in OVERRIDES if text.split(".")[0].split("=")[0] in ("engine", "pretrain")]
    own = [text.removeprefix("pretrain.") for text in chosen]
    data = [text.removeprefix("prepare.") for text in OVERRIDES if text.startswith("prepare.")]
    quickstart, prepared = ROOT / "recipes/quickstart", tmp_path / "prepared"
    with mock.patch.object(corpus, "ensure_wheels", lambda packages, target: make_wheels(tmp_path, byte_tekken())):
        assert main(["run", str(quickstart / "prepare.yaml"), "engine=torch_cpu", *data, f"output_dir={prepared}"]) == 0
    recipe, texts = tmp_path / "offline.yaml", f"stage.data_from={prepared}/prepare/data"
    recipe.write_text(PIPELINE.format(quickstart), encoding="utf-8")
    commands = [["run", str(recipe), *chosen, f"pretrain.{texts}", "export.stage.init_from=pretrain", "tracking=wandb"]]
    commands += [["run", str(quickstart / "pretrain.yaml"), *own, texts, f"tracking={kind}"] for kind in OTHERS]
    for kind, command in zip(("wandb", *OTHERS), commands, strict=True):
        command.append(f"output_dir={tmp_path / kind}")
    python_saw, kernel_saw = watched(tmp_path, "-c", RUNS, json.dumps(commands))
    check(tmp_path, python_saw, kernel_saw)
