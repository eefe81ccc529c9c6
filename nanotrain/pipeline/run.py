"""Runs the entries of a recipe in turn: skips what is finished and unchanged, resumes what was cut off.

Everything that can be refused is refused before the first stage starts; nothing is written until then.
"""

import contextlib
import logging
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from safetensors import SafetensorError

from nanotrain.config.errors import UserError, nearest
from nanotrain.config.load import LoadedEntry, LoadedRecipe
from nanotrain.config.load_messages import shown_path
from nanotrain.config.stage import PRODUCT_KINDS, TRAINING_STAGES, StageConfig
from nanotrain.pipeline.attempts import Attempts, attempt
from nanotrain.pipeline.fingerprint import fingerprint, package_version
from nanotrain.pipeline.inputs import InputRef, resolve_inputs
from nanotrain.pipeline.ownership import check_ownership, owned_folder
from nanotrain.pipeline.preflight import Preflight
from nanotrain.pipeline.products import (
    RECIPE_FILE,
    RECORD_FILE,
    FileStamp,
    StageRecord,
    changed_file,
    load_record,
    product_digest,
    save_record,
    stamp_product,
)
from nanotrain.pipeline.status import State, Status, assess, entry_recipe_digest
from nanotrain.runtime.distributed import current_world, on_first
from nanotrain.runtime.files import STORAGE_ERRORS, folder_digest, remove_leftovers, storage_refuses, write_bytes_atomic
from nanotrain.runtime.run import Run

log = logging.getLogger("nanotrain")

StageFunction = Callable[[Any, Run], Path]
"""Takes the stage's own config and the run, returns the product (a stage function of `nanotrain.stages`)."""

_NOBODY: contextlib.nullcontext[None] = contextlib.nullcontext()
"""Keeps the account of an entry on the other ranks."""

REPORT_FILES = ("report.html", "report.json")


def run_pipeline(
    recipe: LoadedRecipe,
    stages: Callable[[], Mapping[type[StageConfig], StageFunction]],
    *,
    report: Callable[[Path], None],
    force: bool | str = False,
    only: str | None = None,
) -> None:
    """Bring every entry of a recipe to its finished state, and the report up to date.

    Args:
        recipe: composed and validated.
        stages: returns the table of stage functions; called only when a stage has to run, because it imports PyTorch.
        report: writes the report of an output folder; called after every stage.
        force: True = make stale entries again; an entry's name = make that one again even if it is finished, and
            those that follow from it.
        only: the one entry of a pipeline that is brought up to date; what it starts from must be finished.

    Raises:
        UserError: anything that the user can mend.
        Preempted: a stage was asked to stop, and has saved.
    """
    Pipeline(recipe, stages, report, force, only).run()


@dataclass(frozen=True)
class _Work:
    """What is to be done for one entry; the first rank tells it to the others."""

    run: Run
    fingerprint: str
    input_digests: dict[str, str]


class Pipeline:
    """One call of `run_pipeline`."""

    def __init__(
        self,
        recipe: LoadedRecipe,
        stages: Callable[[], Mapping[type[StageConfig], StageFunction]],
        report: Callable[[Path], None],
        force: bool | str = False,
        only: str | None = None,
    ) -> None:
        self._recipe = recipe
        self._stages = stages
        self._report = report
        self._force = force
        self._only = only
        self._entries = [entry for entry in recipe.entries if only in (None, entry.name)]
        self._inputs: dict[str, list[InputRef]] = {}
        self._external_digests: dict[Path, str] = {}
        self._made: set[str] = set()
        self._read: set[Path] = set()

    def run(self) -> None:
        """Run on every rank: the first one decides and keeps the books, the others follow it."""
        on_first(self.check)
        with contextlib.ExitStack() as stack:
            on_first(lambda: self._open(stack))
            for entry in self._entries:
                self._bring_up_to_date(entry)
            on_first(self._write_missing_report)

    def _open(self, stack: contextlib.ExitStack) -> None:
        stack.enter_context(owned_folder(self._recipe))
        remove_leftovers(self._recipe.output_dir)

    def _write_missing_report(self) -> None:
        if not self._report_is_current():
            self._report(self._recipe.output_dir)

    def check(self, ranks_of: Callable[[LoadedEntry], int] | None = None) -> list[LoadedEntry]:
        """Refuse everything that can be refused without running a stage, and return what is to be made. Writes nothing.

        Args:
            ranks_of: returns the ranks that an entry's training is going to have; None = those of this launcher.
        """
        names = [entry.name for entry in self._recipe.entries]
        for flag, name in (("--force", self._force), ("--only", self._only)):
            if isinstance(name, str) and name not in names:
                raise UserError(f"`{flag} {name}` names no entry of this run; {nearest(name, names)}")
        check_ownership(self._recipe)
        self._inputs = resolve_inputs(self._recipe)
        preflight = Preflight(self._recipe, self._inputs)
        preflight.check()
        to_be_made: list[LoadedEntry] = []

        def check_ranks(entry: LoadedEntry) -> None:
            preflight.check_ranks(entry, ranks_of(entry) if ranks_of else current_world().size)

        for entry in self._entries:  # before anything large is read
            if load_record(self._folder(entry)) is None:
                check_ranks(entry)
        for entry in self._entries:
            self._require_inputs(entry)
            made = {other.name for other in to_be_made}
            unknown = any(ref.entry in made for ref in self._inputs[entry.name])
            status = assess(entry, self._folder(entry), None if unknown else self._input_digests(entry))
            self._refuse_stale(entry, status, made)
            if status.state is not State.FINISHED or self._force == entry.name:
                to_be_made.append(entry)
                check_ranks(entry)
                self._verify_inputs(entry, made | {entry.name})
        return to_be_made

    def _require_inputs(self, entry: LoadedEntry) -> None:
        """Raise UserError when `--only` leaves out an entry that this one starts from and that is not finished."""
        if self._only is None:
            return
        for ref in self._inputs[entry.name]:
            if ref.folder is None and load_record(self._recipe.output_dir / ref.entry) is None:
                raise UserError(
                    f"`--only {entry.name}` starts from {ref.entry!r} (`{entry.key_prefix}stage.{ref.key}`), which is not"
                    f" finished in {shown_path(self._recipe.output_dir)}; run `--only {ref.entry}` first."
                )

    def _folder(self, entry: LoadedEntry) -> Path:
        return self._recipe.output_dir / entry.name

    def _refuse_stale(self, entry: LoadedEntry, status: Status, made: set[str]) -> None:
        """Raise UserError for a stale entry, unless `--force` covers it."""
        if status.state is not State.STALE or self._force is True or self._force == entry.name:
            return
        if self._force and any(ref.entry in made for ref in self._inputs[entry.name]):
            return
        raise UserError(
            f"{status.reason}; `--force {entry.name}` makes it again, `--force` every stale one, and another"
            " output_dir keeps both."
        )

    def _input_path(self, ref: InputRef) -> Path:
        if ref.folder is not None:
            return ref.folder
        folder = self._recipe.output_dir / ref.entry
        record = load_record(folder)
        assert record is not None, f"{ref.entry} has not run"
        return record.product_path(folder)

    def _input_digests(self, entry: LoadedEntry) -> dict[str, str]:
        digests = {}
        for ref in self._inputs[entry.name]:
            if ref.folder is None:
                record = load_record(self._recipe.output_dir / ref.entry)
                assert record is not None, f"{ref.entry} has not run"
                digests[ref.key] = record.product_digest
            else:
                if ref.folder not in self._external_digests:
                    self._external_digests[ref.folder] = folder_digest(ref.folder)
                digests[ref.key] = self._external_digests[ref.folder]
        return digests

    def _verify_inputs(self, entry: LoadedEntry, to_be_made: set[str]) -> None:
        """Read every byte of the inputs that exist, and compare with what was recorded when they were finished."""
        for ref in self._inputs[entry.name]:
            if ref.entry in to_be_made:
                continue
            folder = self._recipe.output_dir / ref.entry if ref.folder is None else ref.folder.parent
            record = load_record(folder)
            if record is None or (ref.folder is not None and record.product != ref.folder.name):
                continue  # a folder from elsewhere, without a record to compare with
            changed = changed_file(record, folder, read_all=folder not in self._read)
            self._read.add(folder)
            if changed is not None:
                raise UserError(
                    f"`{entry.key_prefix}stage.{ref.key}`: {shown_path(folder / changed)} was changed or removed after"
                    f" {record.entry!r} was finished; restore it, or make it again with `--force {record.entry}`."
                )

    def _bring_up_to_date(self, entry: LoadedEntry) -> None:
        with _storage_errors_explained(self._folder(entry)):
            work = on_first(lambda: self._begin(entry))
            if work is None:
                return
            with attempt(work.run.folder, work.fingerprint) if current_world().is_first else _NOBODY as attempts:
                product = self._call_stage(entry, work.run)
                stamps = on_first(lambda: stamp_product(product))
            on_first(lambda: self._finish(entry, work, product, stamps, attempts))

    def _begin(self, entry: LoadedEntry) -> "_Work | None":
        """Decide what is to be done, and make the folder ready for it; None = nothing."""
        folder = self._folder(entry)
        digests = self._input_digests(entry)
        status = assess(entry, folder, digests)
        self._refuse_stale(entry, status, self._made)
        forced = self._force == entry.name and status.record is not None
        if status.state is State.FINISHED and not forced:
            log.info("%s: finished before, nothing to do", entry.name)
            return None
        if status.state is State.STALE or forced:
            log.info("%s: removing %s to make it again", entry.name, shown_path(folder))
            _remove(folder)
        self._verify_inputs(entry, set())
        resumed = (folder / RECIPE_FILE).exists()
        log.info("%s: %s", entry.name, "resuming" if resumed else "starting")
        folder.mkdir(parents=True, exist_ok=True)
        remove_leftovers(folder)
        recipe_yaml = yaml.safe_dump(entry.resolved, sort_keys=False, allow_unicode=True)
        write_bytes_atomic(folder / RECIPE_FILE, recipe_yaml.encode())
        config = entry.config
        run = Run(
            name=self._recipe.name,
            entry=entry.name,
            output_dir=self._recipe.output_dir,
            seed=config.seed,
            engine=config.engine,
            tracking=config.tracking,
            inputs={ref.key: self._input_path(ref) for ref in self._inputs[entry.name]},
        )
        return _Work(run, fingerprint(entry_recipe_digest(entry), digests), digests)

    def _call_stage(self, entry: LoadedEntry, run: Run) -> Path:
        stage = entry.config.stage

        def call() -> Path:
            product = self._stages()[type(stage)](stage, run)
            assert product.exists() and product != run.folder and product.is_relative_to(run.folder), (
                f"{product} of {entry.name}"
            )
            return product

        return call() if isinstance(stage, TRAINING_STAGES) else on_first(call)

    def _finish(
        self, entry: LoadedEntry, work: "_Work", product: Path, stamps: dict[str, FileStamp], attempts: Attempts | None
    ) -> None:
        """Record the product, and bring the report up to date."""
        assert attempts is not None
        folder, stage = work.run.folder, type(entry.config.stage)
        entries = {ref.key: ref.entry for ref in self._inputs[entry.name]}
        record = StageRecord(
            fingerprint=work.fingerprint,
            recipe_digest=entry_recipe_digest(entry),
            entry=entry.name,
            stage=stage.__name__,
            kind=PRODUCT_KINDS[stage],
            product=product.relative_to(folder).as_posix(),
            product_digest=product_digest(stamps),
            product_files=stamps,
            inputs={
                key: {"path": str(path), "digest": work.input_digests[key], "entry": entries[key]}
                for key, path in work.run.inputs.items()
            },
            seconds=round(sum(attempts.seconds), 3),
            peak_memory_bytes=attempts.peak_memory_bytes,
            package_version=package_version(),
            finished_unix=time.time(),
        )
        save_record(folder, record)
        log.info("%s: finished in %.1f s", entry.name, record.seconds)
        self._made.add(entry.name)
        self._report(self._recipe.output_dir)

    def _report_is_current(self) -> bool:
        """True when the report was written after the last stage was finished."""
        files = [self._recipe.output_dir / name for name in REPORT_FILES]
        if not all(file.is_file() for file in files):
            return False
        records = [self._folder(entry) / RECORD_FILE for entry in self._entries]
        return min(f.stat().st_mtime_ns for f in files) >= max(r.stat().st_mtime_ns for r in records)


@contextlib.contextmanager
def _storage_errors_explained(folder: Path) -> Iterator[None]:
    """Turn a disk that is full or read-only into one sentence; what was finished stays finished."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        of_storage = error.errno in STORAGE_ERRORS if isinstance(error, OSError) else storage_refuses(folder)
        if not of_storage:
            raise
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise UserError(
            f"{shown_path(folder)} cannot be written ({reason}); what was saved is intact: make room, and the"
            " same command continues."
        ) from error


def _remove(folder: Path) -> None:
    """Remove an entry's folder so that a kill leaves it whole or gone, never in part under its own name."""
    doomed = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    folder.replace(doomed)
    shutil.rmtree(doomed, ignore_errors=True)
