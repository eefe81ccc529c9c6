"""Prepare: pinned packages to a data folder with tokenizer, token shards by category, chat rows and a manifest."""

from pathlib import Path

from nanotrain.config.stage import PrepareConfig
from nanotrain.data.corpus import build_corpus
from nanotrain.runtime.files import remove_leftovers, write_json_atomic
from nanotrain.runtime.progress import Progress
from nanotrain.runtime.run import Run


def prepare(config: PrepareConfig, run: Run) -> Path:
    """Build `<entry>/data` and return it.

    The data does not depend on the run's seed: runs with different seeds train on the same text and are compared on the
    same held-out text. The seed enters where data is drawn, in the loaders.
    """
    data = run.folder / "data"
    for folder in (data, *(path for path in data.glob("*") if path.is_dir())):
        remove_leftovers(folder)
    results = build_corpus(config.corpus, data, Progress(run.folder / "progress.jsonl"))
    write_json_atomic(run.folder / "results.json", results)
    return data
