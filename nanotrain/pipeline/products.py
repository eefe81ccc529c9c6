"""What a finished entry left: `stage.json`, written last and atomically, with a digest of every file of the product."""

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from nanotrain.config.errors import UserError
from nanotrain.config.load_messages import shown_path
from nanotrain.runtime.files import file_digest, write_json_atomic

RECORD_FILE = "stage.json"
RECIPE_FILE = "recipe.yaml"
ATTEMPTS_FILE = "attempts.json"
BOOKKEEPING = (RECORD_FILE, RECIPE_FILE, ATTEMPTS_FILE)
"""Files of an entry's folder that the pipeline writes; all others are the stage's work."""


@dataclass(frozen=True)
class FileStamp:
    """One file of a product. Size and time tell cheaply that nothing changed; the digest tells surely."""

    bytes: int
    modified_ns: int
    sha256: str


@dataclass(frozen=True)
class StageRecord:
    """The content of stage.json."""

    fingerprint: str
    recipe_digest: str
    entry: str
    stage: str
    """Class of the stage's config."""
    kind: str
    """data, checkpoint or report."""
    product: str
    """Path of the product, relative to the entry's folder."""
    product_digest: str
    product_files: dict[str, FileStamp]
    inputs: dict[str, dict[str, str]]
    """By key (`init_from` ...): {"path", "digest", "entry" (empty for a folder from outside the run)}."""
    seconds: float
    """Wall clock of all attempts, killed ones included."""
    peak_memory_bytes: int
    package_version: str
    finished_unix: float

    def product_path(self, folder: Path) -> Path:
        """Return the product of the entry whose folder is `folder`."""
        return folder / self.product


def save_record(folder: Path, record: StageRecord) -> None:
    """Write stage.json: from now on the entry counts as finished."""
    write_json_atomic(folder / RECORD_FILE, asdict(record))


def load_record(folder: Path) -> StageRecord | None:
    """Return the record of a finished entry, None when there is none.

    Raises:
        UserError: stage.json was damaged.
    """
    file = folder / RECORD_FILE
    if not file.is_file():
        return None
    try:
        value: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        value["product_files"] = {name: FileStamp(**stamp) for name, stamp in value["product_files"].items()}
        return StageRecord(**value)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{shown_path(file)} is damaged ({type(error).__name__}: {error}); remove the file and run the entry again."
        ) from error


def stamp_product(product: Path) -> dict[str, FileStamp]:
    """Return the stamps of all files of a product, which is a folder or a single file."""
    files = [product] if product.is_file() else sorted(path for path in product.rglob("*") if path.is_file())
    stamps = {}
    for path in files:
        status = path.stat()
        name = path.name if product.is_file() else path.relative_to(product).as_posix()
        stamps[name] = FileStamp(status.st_size, status.st_mtime_ns, file_digest(path))
    return stamps


def product_digest(stamps: dict[str, FileStamp]) -> str:
    """Return one sha256 over names and contents; for a folder it equals `runtime.files.folder_digest`."""
    total = hashlib.sha256()
    for name in sorted(stamps, key=lambda name: Path(name).parts):
        total.update(f"{name}\0{stamps[name].sha256}\n".encode())
    return total.hexdigest()


def changed_file(record: StageRecord, folder: Path, *, read_all: bool) -> str | None:
    """Return the name of the first file of a product that is missing, new or changed since it was finished.

    Args:
        record: of the entry.
        folder: of the entry.
        read_all: read every file; otherwise only those whose size or modification time differs from the record.
    """
    product = record.product_path(folder)
    if not product.exists():
        return record.product
    single = product.is_file()
    present = {product.name: product} if single else {p.relative_to(product).as_posix(): p for p in product.rglob("*")}
    for name, path in sorted(present.items()):
        if path.is_file() and name not in record.product_files:
            return f"{record.product}/{name}"
    for name, stamp in sorted(record.product_files.items()):
        shown = record.product if single else f"{record.product}/{name}"
        if name not in present or not present[name].is_file():
            return shown
        status = present[name].stat()
        same_stamp = (status.st_size, status.st_mtime_ns) == (stamp.bytes, stamp.modified_ns)
        if status.st_size != stamp.bytes:
            return shown
        if (read_all or not same_stamp) and file_digest(present[name]) != stamp.sha256:
            return shown
    return None
