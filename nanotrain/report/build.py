"""Builds report.html and report.json of a run's folder, at any time: after every stage and at the end."""

from pathlib import Path

from nanotrain.report.numbers import collect_numbers
from nanotrain.report.page import render_page
from nanotrain.report.run_folder import read_run
from nanotrain.runtime.files import write_bytes_atomic, write_json_atomic

HTML_FILE = "report.html"
JSON_FILE = "report.json"


def build_report(output_dir: Path) -> None:
    """Write `output_dir`/report.html, one file without any request, and report.json with the same numbers.

    Equal inputs and versions give equal bytes. Entries that are unfinished or missing leave gaps, not errors.

    Raises:
        UserError: the folder holds no run, or a file in it is damaged.
    """
    run = read_run(Path(output_dir))
    numbers = collect_numbers(run)
    write_json_atomic(Path(output_dir) / JSON_FILE, numbers)
    write_bytes_atomic(Path(output_dir) / HTML_FILE, render_page(run, numbers).encode())
