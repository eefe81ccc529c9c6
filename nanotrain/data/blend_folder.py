"""A blend of prepared shards as a data folder, and a recipe's curriculum over it.

The folder holds links to the shards, not copies: a source is `<source>/train.bin .idx`, or, made of several shards,
`<source>/train-00000.bin .idx` and so on, walked as one. Its held-out shard stands beside as `validation`. The manifest
has the sha256 of every file, so that the loader reads nothing that was not checked.
"""

import json
import os
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nanotrain.config.blend import Curriculum
from nanotrain.config.data import PhaseConfig
from nanotrain.config.errors import MissingInputError, UserError
from nanotrain.data.manifest import write_manifest
from nanotrain.data.token_shards import TokenShard, shard_files
from nanotrain.planning.repetition import check_epochs, curriculum_caps
from nanotrain.runtime.files import file_digest, folder_atomic

VALIDATION = "validation"


@dataclass(frozen=True)
class PreparedSource:
    """A source's shards on disk, by prefix."""

    name: str
    train: tuple[Path, ...]
    validation: tuple[Path, ...]

    def tokens(self, prefixes: Iterable[Path]) -> list[int]:
        """Return the tokens of each shard."""
        return [TokenShard(prefix).num_tokens for prefix in prefixes]


def find_shards(root: Path, name: str) -> PreparedSource:
    """Return the shards of a source: `root/name.idx`, `root/name-*.idx`, or every .idx below `root/name`.

    A shard called validation, or in a folder of that name, is held-out text.

    Raises:
        MissingInputError: there is none to train on.
        UserError: more than one is held out.
    """
    found = [*root.glob(f"{name}.idx"), *root.glob(f"{name}-[0-9]*.idx"), *(root / name).rglob("*.idx")]
    prefixes = sorted({file.with_suffix("") for file in found if not file.name.startswith(".")})
    held_out = tuple(p for p in prefixes if VALIDATION in p.relative_to(root).parts or p.name.endswith(VALIDATION))
    train = tuple(prefix for prefix in prefixes if prefix not in held_out)
    if not train:
        raise MissingInputError(
            f"source `{name}` has no shard in `{root}` ({name}.idx, {name}-00000.idx or {name}/*.idx); tokenise it there"
            f" with `python -m data_prep.tokenize_corpus --output {root / name / 'train'} ...`, or take it out of the blend."
        )
    if len(held_out) > 1:
        raise UserError(
            f"source `{name}` has {len(held_out)} held-out shards (`{held_out[0]}`, `{held_out[1]}`); keep one, or tokenise"
            " their text into one."
        )
    return PreparedSource(name, train, held_out)


def used_sources(curriculum: Curriculum) -> list[str]:
    """Return the sources with a weight above 0 in some phase, in order."""
    named = (name for _, blend in curriculum.phases for name, weight in blend.weights.items() if weight > 0)
    return list(dict.fromkeys(named))


def plan_blend(curriculum: Curriculum, root: Path, total_tokens: int) -> list[dict[str, Any]]:
    """Return, for each source, its shares by phase, its tokens on disk and the epochs of the run, caps enforced.

    Raises:
        MissingInputError: a source without shards.
        UserError: a source would be repeated beyond its cap.
    """
    rows = []
    starts = [0.0, *(until for until, _ in curriculum.phases[:-1])]
    for name in used_sources(curriculum):
        source = find_shards(root, name)
        shares = [blend.weights[name] if name in blend.weights else 0.0 for _, blend in curriculum.phases]
        drawn = sum(
            share * (until - start) * total_tokens
            for share, start, (until, _) in zip(shares, starts, curriculum.phases, strict=True)
        )
        tokens = source.tokens(source.train)
        if not sum(tokens):
            raise UserError(f"source `{name}` in `{root}` has shards without a token; take it out of the blend.")
        rows.append(
            {"name": name, "source": source, "shares": shares, "part_tokens": tokens, "train_tokens": sum(tokens)}
            | {"validation_tokens": sum(source.tokens(source.validation)), "drawn_tokens": round(drawn)}
            | {"epochs": drawn / sum(tokens)}
        )
    check_epochs(
        {row["name"]: row["epochs"] for row in rows},
        curriculum_caps(curriculum.recipe_phases()),
        f"{total_tokens:,} tokens of this blend",
        "prepare more text, lower the weight or the tokens, or raise `max_epochs`",
    )
    return rows


def build_blend_folder(rows: list[dict[str, Any]], curriculum: Curriculum, tokenizer: Path, output: Path) -> None:
    """Write the blend folder: links, tokenizer, manifest; it appears whole or not at all.

    Args:
        rows: of `plan_blend`.
        curriculum: for the manifest.
        tokenizer: folder of the tokenizer that made the shards.
        output: the folder; an existing one is replaced.

    Raises:
        UserError: no held-out shard, or shards of another tokenizer.
    """
    digest = _checked_tokenizer(rows, tokenizer)
    if not any(row["validation_tokens"] for row in rows):
        raise UserError(
            "no source has a held-out shard (`<source>/validation.idx`), so training could not be measured; tokenise some"
            " text that is kept apart to such a name."
        )
    with folder_atomic(output) as folder:
        shutil.copytree(tokenizer, folder / "tokenizer")
        files = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
        categories = {}
        for row in rows:
            source = row["source"]
            single = len(source.train) == 1
            for number, prefix in enumerate(source.train):
                files += _link(
                    prefix, folder, f"{row['name']}/train" if single else f"{row['name']}/train-{number:05d}"
                )
            for prefix in source.validation:
                files += _link(prefix, folder, f"{row['name']}/{VALIDATION}")
            categories[row["name"]] = {key: row[key] for key in ("train_tokens", "validation_tokens", "drawn_tokens")}
            categories[row["name"]] |= {"epochs": row["epochs"], "shards": [str(prefix) for prefix in source.train]}
        phases = [{"until": until, "weights": blend.weights} for until, blend in curriculum.phases]
        content = {"kind": "blend", "tokenizer_digest": digest, "categories": categories, "curriculum": phases}
        write_manifest(folder, content, files)


def _checked_tokenizer(rows: list[dict[str, Any]], tokenizer: Path) -> str:
    """Return the tokenizer's digest after comparing it with what each shard's manifest says made it."""
    file = tokenizer / "tokenizer.json"
    if not file.is_file():
        raise MissingInputError(f"`{file}` is missing; `--tokenizer` names the folder that made the shards.")
    digest = file_digest(file)
    for row in rows:
        for prefix in (*row["source"].train, *row["source"].validation):
            manifest = prefix.with_name(f"{prefix.name}.manifest.json")
            if not manifest.is_file():
                continue
            try:
                made_by = json.loads(manifest.read_bytes())["tokenizer_digest"]
            except (ValueError, KeyError, TypeError) as error:
                raise UserError(f"`{manifest}` is not a shard's manifest ({error!r}); tokenise again.") from None
            if made_by != digest:
                raise UserError(
                    f"`{prefix}` was tokenised by another tokenizer than `{tokenizer}` (sha256 differs); tokenise it again."
                )
    return digest


def _link(prefix: Path, folder: Path, name: str) -> list[str]:
    """Link both files of a shard into the folder and return their names there."""
    names = []
    for original in shard_files(prefix):
        if not original.is_file():
            raise MissingInputError(f"`{original}` is gone since the blend was planned; run the same command again.")
        target = folder / f"{name}{original.suffix}"
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            os.link(original.resolve(), target)
        except OSError:  # another file system
            target.symlink_to(original.resolve())
        names.append(target.relative_to(folder).as_posix())
    return names


def check_caps(phases: list[PhaseConfig], epochs: dict[str, float], where: str) -> None:
    """Refuse a stage whose loader would walk through a source more often than its cap; `where` is the key."""
    check_epochs(
        epochs,
        curriculum_caps(phases),
        f"`{where}`",
        "prepare more text, lower the weight or the steps, or raise `max_epochs`",
    )
