"""Builds the data folder: tokenizer, chat rows, and five categories of split, tokenised text, each a unit of work.

Every unit writes its files under temporary names and renames them; a journal records what is finished with the
digests of its files, so a killed run does only the rest and ends in the same bytes.
"""

import hashlib
import json
import logging
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from nanotrain.config.data import CATEGORIES, CorpusConfig
from nanotrain.config.errors import UserError
from nanotrain.data import chat_rows
from nanotrain.data.chat_mixture import build_rows
from nanotrain.data.corpora.conversations import chitchat_turns
from nanotrain.data.documents import Document, cap_bytes, drop_duplicates, split_by_family, unit_hash
from nanotrain.data.manifest import write_manifest
from nanotrain.data.overlap import overlap_report
from nanotrain.data.packages import AnyPackage, open_package, package_version
from nanotrain.data.pip_mini import (
    CHITCHAT_PACKAGE,
    NUM_ROW_DOCUMENTS,
    PACKAGES,
    SOURCES,
    TEKKEN_MEMBER,
    TEKKEN_PACKAGE,
    Source,
)
from nanotrain.data.token_shards import TokenShardWriter, smallest_dtype
from nanotrain.data.tokenizer import NUM_SPECIALS, CorpusEncoder, build_tokenizer, read_tekken, save_tokenizer
from nanotrain.data.wheels import Package, WheelReader, cache_folder, ensure_wheels
from nanotrain.runtime.files import file_digest
from nanotrain.runtime.progress import Progress

_LOG = logging.getLogger("nanotrain")
_ENCODED_AT_ONCE = 4096
TOKENIZER_FILES = tuple(
    f"tokenizer/{name}"
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")
)
CHAT_FILES = ("chat/train.jsonl", "chat/validation.jsonl")


def shard_names(category: str) -> tuple[str, ...]:
    """Return the file names of a category's two shards, relative to the data folder."""
    return tuple(f"{category}/{split}.{end}" for split in ("train", "validation") for end in ("bin", "idx"))


def _encoded(encoder: CorpusEncoder, documents: list[Document]) -> Iterator[np.ndarray]:
    """Yield the ids of each document; a part at a time, because lists of ids are large."""
    for start in range(0, len(documents), _ENCODED_AT_ONCE):
        yield from encoder.encode_documents([d.text for d in documents[start : start + _ENCODED_AT_ONCE]])


class CorpusBuilder:
    """One build of one data folder.

    Args:
        config: what to build.
        folder: the data folder.
        progress: journal of finished units.
        wheels: package name -> its file: a wheel, a Debian package or an npm tarball.
        sources: the table of sources.
        packages: the table of packages.
    """

    def __init__(
        self,
        config: CorpusConfig,
        folder: Path,
        progress: Progress,
        wheels: dict[str, Path],
        sources: tuple[Source, ...] = SOURCES,
        packages: tuple[AnyPackage, ...] = PACKAGES,
    ) -> None:
        self._config, self._folder, self._progress = config, folder, progress
        self._wheels, self._sources, self._packages = wheels, sources, packages
        self._digests = {name: file_digest(wheel) for name, wheel in wheels.items()}
        settings = {name: str(value) for name, value in sorted(vars(config).items())}
        caps = {source.name: source.max_bytes for source in sources}
        versions = [version("nanotrain"), version("reasoning-gym")]
        identity = json.dumps([settings, *versions, self._digests, caps], sort_keys=True)
        self._key = hashlib.sha256(identity.encode()).hexdigest()[:16]

    def build(self) -> dict[str, Any]:
        """Build what is missing and write the manifest.

        Returns:
            The numbers of results.json: categories, chat, manifest_digest, tokenizer_digest.
        """
        units: list[tuple[str, tuple[str, ...], Callable[[], dict[str, Any]]]] = [
            ("tokenizer", TOKENIZER_FILES, self._build_tokenizer),
            ("chat", CHAT_FILES, self._build_chat),
        ]
        for category in CATEGORIES:
            units.append((category, shard_names(category), lambda category=category: self._build_category(category)))
        done: dict[str, dict[str, Any]] = {}
        for name, files, work in (bar := tqdm(units, desc="prepare", unit="part")):
            bar.set_postfix_str(name)
            done[name] = self._run_unit(name, files, work)
        return self._finish(done, [name for _, files, _ in units for name in files])

    def _run_unit(self, name: str, files: tuple[str, ...], work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Do a unit unless the journal has it and its files are the recorded ones."""
        key = f"{self._key}:{name}"
        if key in self._progress and self._progress[key]["files"] == self._file_digests(files):
            return self._progress[key]["numbers"]
        numbers = work()
        return self._progress.record(key, {"numbers": numbers, "files": self._file_digests(files)})["numbers"]

    def _file_digests(self, files: tuple[str, ...]) -> dict[str, str]:
        paths = {name: self._folder / name for name in files}
        return {name: file_digest(path) for name, path in paths.items() if path.is_file()}

    def _build_tokenizer(self) -> dict[str, Any]:
        with WheelReader(self._wheels[TEKKEN_PACKAGE]) as reader:
            pattern, tokens = read_tekken(reader.read_bytes(TEKKEN_MEMBER), self._config.vocab_size - NUM_SPECIALS)
        save_tokenizer(build_tokenizer(pattern, tokens), self._folder / "tokenizer")
        return {"digest": file_digest(self._folder / "tokenizer/tokenizer.json")}

    def _build_chat(self) -> dict[str, Any]:
        config = self._config
        with WheelReader(self._wheels[CHITCHAT_PACKAGE]) as reader:
            talks = sorted(chitchat_turns(reader), key=lambda talk: unit_hash(talk[0], "chat"))
        train, validation = build_rows(
            config.num_chat_rows, config.num_chat_validation_rows, config.validation_fraction, talks
        )
        chat_rows.save_rows(train, self._folder / CHAT_FILES[0])
        chat_rows.save_rows(validation, self._folder / CHAT_FILES[1])
        return {
            "train_rows": len(train),
            "validation_rows": len(validation),
            "train_tasks": chat_rows.count_tasks(train),
            "validation_tasks": chat_rows.count_tasks(validation),
        }

    def _documents(self, category: str) -> tuple[list[Document], int]:
        """Return the category's documents in a mixed order, and how many exact duplicates were left out."""
        documents: list[Document] = []
        dropped, seen = 0, set()
        for source in self._sources:
            if source.category != category:
                continue
            with open_package(self._wheels[source.package]) as reader:
                found = [document for document in source.extract(reader) if document.text.strip()]
            if not found:
                raise UserError(
                    f"source `{source.name}` found no document in `{self._wheels[source.package].name}`: this version of"
                    f" the package has another layout; use the version that docs/data.md names."
                )
            unique = drop_duplicates(found, seen)
            dropped += len(found) - len(unique)
            documents += cap_bytes(unique, source.max_bytes)
        if category == "sft":
            for name, count in zip(CHAT_FILES, (NUM_ROW_DOCUMENTS, self._config.num_chat_validation_rows), strict=True):
                rows = chat_rows.load_rows(self._folder / name)
                documents += drop_duplicates(chat_rows.rows_as_documents(rows, count), seen)
        documents = cap_bytes(documents, self._config.max_bytes_per_category)
        return sorted(documents, key=lambda document: (unit_hash(document.text, "order"), document.text)), dropped

    def _build_category(self, category: str) -> dict[str, Any]:
        documents, dropped = self._documents(category)
        train, validation = split_by_family(documents, self._config.validation_fraction)
        overlap, validation = overlap_report(train, validation, self._config.max_validation_overlap)
        if not validation:
            raise UserError(
                f"every held-out document of `{category}` shares more than `max_validation_overlap`"
                f" ({self._config.max_validation_overlap}) of its 13-word windows with training text; raise it."
            )
        encoder = CorpusEncoder(self._folder / "tokenizer")
        sources: dict[str, dict[str, int]] = {}
        numbers: dict[str, Any] = {}
        for split, side in (("train", train), ("validation", validation)):
            writer = TokenShardWriter(self._folder / category / split, smallest_dtype(self._config.vocab_size))
            total = 0
            for document, tokens in zip(side, _encoded(encoder, side), strict=True):
                writer.add_document(tokens)
                total += len(tokens)
                count = sources.setdefault(document.source, {"documents": 0, "bytes": 0, "tokens": 0})
                count["documents"] += 1
                count["bytes"] += len(document.text.encode())
                count["tokens"] += len(tokens)
            writer.finish()
            numbers |= {f"{split}_tokens": total, f"{split}_documents": len(side)}
            numbers[f"{split}_families"] = len({document.family for document in side})
        return numbers | {
            "bytes": sum(count["bytes"] for count in sources.values()),
            "duplicates_removed": dropped,
            "validation_13gram_overlap": overlap["share"],
            "overlap": overlap,
            "sources": sources,
        }

    def _package_digest(self, package: AnyPackage) -> str:
        """A compiled package's wheel differs by platform: what is read from it is pinned instead."""
        if isinstance(package, Package) and package.members:
            return package.members[0][1]
        return self._digests[package.name]

    def _finish(self, done: dict[str, dict[str, Any]], files: list[str]) -> dict[str, Any]:
        """Write the manifest and return the results."""
        categories = {category: dict(done[category]) for category in CATEGORIES}
        packages = {package.name: package for package in self._packages}
        listed = []
        for category in CATEGORIES:
            counts = categories[category].pop("sources")
            for source in self._sources:
                if source.category == category and source.name in counts:
                    package = packages[source.package]
                    listed.append(
                        {"name": source.name, "category": category, "package": package.name, "member": source.member}
                        | {"version": package_version(package, self._wheels[package.name]), "licence": package.licence}
                        | {"sha256": self._package_digest(package)}
                        | counts[source.name]
                    )
            if "chat-rows" in counts:
                own = {"name": "chat-rows", "category": category, "package": "nanotrain", "licence": "Apache-2.0"}
                listed.append(own | {"version": version("nanotrain"), "member": CHAT_FILES[0]} | counts["chat-rows"])
        content = {
            "corpus": self._config.kind.value,
            "vocab_size": self._config.vocab_size,
            "validation_fraction": self._config.validation_fraction,
            "tokenizer_digest": done["tokenizer"]["digest"],
            "sources": listed,
            "categories": categories,
            "chat": done["chat"],
            "generators": {"reasoning-gym": version("reasoning-gym")},
        }
        digest = write_manifest(self._folder, content, files)
        return {
            "categories": categories,
            "chat": done["chat"],
            "manifest_digest": digest,
            "tokenizer_digest": done["tokenizer"]["digest"],
        }


def build_corpus(config: CorpusConfig, folder: Path, progress: Progress) -> dict[str, Any]:
    """Fetch the packages into the cache and build the data folder; see `CorpusBuilder.build`."""
    wheels = ensure_wheels(PACKAGES, cache_folder())
    results = CorpusBuilder(config, folder, progress, wheels).build()
    tokens = sum(category["train_tokens"] for category in results["categories"].values())
    _LOG.info("prepared %d training tokens and %d chat rows", tokens, results["chat"]["train_rows"])
    return results
