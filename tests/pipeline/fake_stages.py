"""Stage functions for tests: real folders, real resume, no PyTorch. Also a program, for tests that kill it.

python fake_stages.py RECIPE SECONDS_PER_ITEM [override ...]
"""

import hashlib
import json
import sys
import time
from pathlib import Path

from nanotrain.config.load import load_recipe
from nanotrain.config.stage import PRODUCT_KINDS, StageConfig
from nanotrain.pipeline.run import run_pipeline
from nanotrain.runtime.files import folder_atomic, folder_digest, write_json_atomic
from nanotrain.runtime.progress import Progress
from nanotrain.runtime.run import Run

ITEMS = 4


class FakeStages:
    """Writes a product that depends on the config, the seed and every byte of the inputs."""

    def __init__(self, seconds_per_item: float = 0.0) -> None:
        self.calls: list[str] = []
        self.runs: dict[str, Run] = {}
        self._seconds = seconds_per_item

    def table(self):
        return dict.fromkeys(PRODUCT_KINDS, self._stage)

    def _stage(self, config: StageConfig, run: Run) -> Path:
        self.calls.append(run.entry)
        self.runs[run.entry] = run
        state = hashlib.sha256(repr((config, run.seed)).encode())
        for key, path in sorted(run.inputs.items()):
            state.update(f"{key}{folder_digest(path)}".encode())
        progress = Progress(run.folder / "progress.jsonl")
        for item in range(ITEMS):
            if str(item) not in progress:
                time.sleep(self._seconds)
                state_item = hashlib.sha256(state.digest() + bytes([item])).hexdigest()
                progress.record(str(item), state_item)
        values = [progress[str(item)] for item in range(ITEMS)]
        kind = PRODUCT_KINDS[type(config)]
        write_json_atomic(run.folder / "results.json", {"values": values})
        if kind == "report":
            return run.folder / "results.json"
        product = run.folder / {"data": "data", "checkpoint": "hf"}[kind]
        with folder_atomic(product) as temporary:
            (temporary / "deep").mkdir()
            (temporary / "deep" / "weights.safetensors").write_text("".join(values))
            vocabulary = {"vocab_size": 2000}
            (temporary / ("manifest.json" if kind == "data" else "config.json")).write_text(json.dumps(vocabulary))
            (temporary / "model.safetensors").write_text(values[0])
        return product


def build_report(output_dir: Path) -> None:
    """Write both files of a report from what the entries left."""
    results = {path.parent.name: json.loads(path.read_text()) for path in sorted(output_dir.glob("*/results.json"))}
    write_json_atomic(output_dir / "report.json", results)
    (output_dir / "report.html").write_text("report")


if __name__ == "__main__":
    fakes = FakeStages(float(sys.argv[2]))
    run_pipeline(load_recipe(sys.argv[1], sys.argv[3:]), fakes.table, report=build_report)
