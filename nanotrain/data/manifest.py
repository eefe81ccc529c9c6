"""A prepared data folder and its manifest: nothing is read before its bytes were checked against the manifest."""

import fnmatch
import json
import re
from pathlib import Path
from typing import Any

from nanotrain.config.data import CATEGORIES, PhaseConfig
from nanotrain.config.errors import MissingInputError, UserError, nearest
from nanotrain.data.verified_files import verify_file
from nanotrain.runtime.files import file_digest, write_json_atomic

MANIFEST = "manifest.json"
_FORMAT = 1


def write_manifest(folder: Path, content: dict[str, Any], files: list[str]) -> str:
    """Write manifest.json over the named files of `folder` and return the manifest's own sha256.

    Args:
        folder: the data folder.
        content: sources, categories, chat, tokenizer.
        files: paths relative to `folder`; each gets its size and sha256.
    """
    listed = {name: {"bytes": (folder / name).stat().st_size, "sha256": file_digest(folder / name)} for name in files}
    write_json_atomic(folder / MANIFEST, content | {"format": _FORMAT, "files": listed})
    return file_digest(folder / MANIFEST)


class DataFolder:
    """A finished data folder.

    Raises:
        MissingInputError: the folder or its manifest is not there.
        UserError: the manifest cannot be read.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = Path(folder)
        file = self.folder / MANIFEST
        if not file.is_file():
            raise MissingInputError(
                f"`{file}` is missing, so `{folder}` is not a prepared data folder; run the prepare stage or correct"
                " `data_from`."
            )
        try:
            self.manifest: dict[str, Any] = json.loads(file.read_bytes())
            version, self._files = self.manifest["format"], self.manifest["files"]
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"`{file}` is not a manifest of this program ({error}); run the prepare stage again."
            ) from None
        if version != _FORMAT:
            raise UserError(
                f"`{file}` has format {version}, this version reads {_FORMAT}; run the prepare stage again."
            )

    @property
    def tokenizer_digest(self) -> str:
        """sha256 of the tokenizer.json that made the tokens."""
        return self.manifest["tokenizer_digest"]

    def file(self, name: str) -> Path:
        """Return the path of a file after checking its bytes against the manifest.

        Raises:
            MissingInputError: the file is not there.
            UserError: it is not in the manifest, or its bytes are not those of the manifest.
        """
        path = self.folder / name
        if name not in self._files:
            raise UserError(f"`{path}` is not listed in `{self.folder / MANIFEST}`; run the prepare stage again.")
        entry = self._files[name]
        manifest = self.folder / MANIFEST
        return verify_file(
            path, size=entry["bytes"], sha256=entry["sha256"], manifest=manifest, remedy="run the prepare stage again"
        )

    def shards(self, category: str, split: str) -> list[Path]:
        """Return the prefixes of a category's shards, `split` or `split-*` in the order of their names, all checked."""
        stems = [name.removesuffix(".bin") for name in sorted(self._files) if name.endswith(".bin")]
        found = [stem for stem in stems if fnmatch.fnmatchcase(stem, f"{category}/{split}-*")]
        if f"{category}/{split}" in stems or not found:
            found.insert(0, f"{category}/{split}")
        return [self.shard(category, stem.removeprefix(f"{category}/")) for stem in found]

    def shard(self, category: str, split: str) -> Path:
        """Return the prefix of a token shard after checking both of its files."""
        self.file(f"{category}/{split}.idx")
        return self.file(f"{category}/{split}.bin").with_suffix("")

    def sources(self, split: str) -> list[str]:
        """Return the sources that have a shard of the split: the five categories first, then others by name."""
        pattern = re.compile(rf"(.+)/{re.escape(split)}(?:-\d+)?\.idx")
        found = {match[1] for name in self._files if (match := pattern.fullmatch(name))}
        return sorted(found, key=lambda name: (CATEGORIES.index(name) if name in CATEGORIES else len(CATEGORIES), name))

    def check_tokenizer(self, tokenizer_folder: Path) -> None:
        """Refuse a tokenizer that is not the one that made the tokens.

        Raises:
            MissingInputError: there is no tokenizer.json.
            UserError: its sha256 differs.
        """
        file = Path(tokenizer_folder) / "tokenizer.json"
        if not file.is_file():
            raise MissingInputError(f"`{file}` is missing; a tokenizer folder holds tokenizer.json.")
        if file_digest(file) != self.tokenizer_digest:
            raise UserError(
                f"`{file}` is not the tokenizer of the data in `{self.folder}` (sha256 differs); use the data that the"
                " checkpoint was trained on, or the other way round."
            )


def is_data_folder(folder: Path) -> bool:
    """Return whether the folder has a manifest of this program; what is damaged is named when the folder is used."""
    try:
        manifest = json.loads((folder / MANIFEST).read_bytes())
    except (OSError, ValueError):
        return False
    return isinstance(manifest, dict) and "format" in manifest


def check_sources(phases: list[PhaseConfig], folder: Path, where: str) -> None:
    """Refuse a curriculum that names a source which the data folder does not have.

    Raises:
        UserError: unknown source; the nearest name is offered.
    """
    manifest = DataFolder(folder).manifest
    categories = manifest["categories"] if "categories" in manifest else {}
    if not categories:
        return  # a folder of older form lists no sources; the loader names a missing shard
    for number, phase in enumerate(phases):
        for name, weight in phase.weights.items():
            if weight > 0 and name not in categories:
                raise UserError(
                    f"`{where}[{number}].weights.{name}` is not a source of `{folder}`; {nearest(name, categories)}"
                )
