"""What can be known to fail before the first stage starts: vocabularies, ranks that cannot share the work, a small disk."""

import json
import shutil
from pathlib import Path

import yaml

from nanotrain.config.data import names_a_folder
from nanotrain.config.engine import EngineKind
from nanotrain.config.errors import UserError
from nanotrain.config.load import LoadedEntry, LoadedRecipe
from nanotrain.config.load_messages import shown_path
from nanotrain.config.model import ModelConfig
from nanotrain.config.stage import (
    TRAINING_STAGES,
    DistillConfig,
    PrepareConfig,
    PretrainConfig,
    PruneConfig,
    SftConfig,
)
from nanotrain.data.manifest import check_sources, is_data_folder
from nanotrain.pipeline.architectures import Architectures
from nanotrain.pipeline.inputs import InputRef
from nanotrain.pipeline.products import RECIPE_FILE, load_record
from nanotrain.planning.layout import check_ranks
from nanotrain.planning.parameters import count_parameters

_FP32_BYTES = 4
_STATE_TENSORS = 3
"""Weights and two moments of AdamW."""


class Preflight:
    """Checks over all entries of a recipe and their resolved inputs."""

    def __init__(self, recipe: LoadedRecipe, inputs: dict[str, list[InputRef]]) -> None:
        self._recipe = recipe
        self._inputs = inputs
        self._entries = {entry.name: entry for entry in recipe.entries}

    def check(self) -> None:
        """Raise UserError for what cannot work."""
        for entry in self._recipe.entries:
            self._check_vocabularies(entry)
            self._check_sources(entry)
        self._check_disk()

    def check_ranks(self, entry: LoadedEntry, world_size: int) -> None:
        """Raise UserError where so many ranks cannot share the entry's training: its batch, its model or its teacher."""
        stage = entry.config.stage
        if not isinstance(stage, TRAINING_STAGES):
            return
        models: list[ModelConfig] = []
        if entry.config.engine.kind is EngineKind.megatron:  # the others keep whole layers
            known = Architectures(self._recipe, self._inputs)
            models = [model for model in (known.trained(entry), known.teacher(entry)) if model is not None]
        path = f"{entry.key_prefix}stage.training"
        check_ranks(models, stage.training, entry.config.engine, world_size, training_path=path)

    def _input(self, entry: LoadedEntry, key: str) -> InputRef | None:
        return next((ref for ref in self._inputs[entry.name] if ref.key == key), None)

    def _folder(self, ref: InputRef) -> Path | None:
        """Return the product folder of an input that exists already."""
        if ref.folder is not None:
            return ref.folder
        record = load_record(self._recipe.output_dir / ref.entry)
        return record.product_path(self._recipe.output_dir / ref.entry) if record else None

    def _check_vocabularies(self, entry: LoadedEntry) -> None:
        stage, prefix = entry.config.stage, f"{entry.key_prefix}stage"
        own = self._own_vocabulary(entry)
        if isinstance(stage, DistillConfig):
            teacher_ref = self._input(entry, "teacher_from")
            teacher = self._checkpoint_vocabulary(teacher_ref)
            if own and teacher and own != teacher:
                raise UserError(
                    f"`{prefix}.teacher_from` ({stage.teacher_from}) has a vocabulary of {teacher} tokens and"
                    f" `{prefix}.init_from` ({stage.init_from}) one of {own}; distillation compares token by token, so"
                    " they must be equal."
                )
        if isinstance(stage, PretrainConfig | DistillConfig | SftConfig | PruneConfig):
            tokenizer = self._data_vocabulary(self._input(entry, "data_from"))
            if own and tokenizer and tokenizer > own:
                where = "model.vocab_size" if isinstance(stage, PretrainConfig) else "init_from"
                raise UserError(
                    f"`{prefix}.{where}` gives the model a vocabulary of {own} tokens, but the tokenizer of"
                    f" `{prefix}.data_from` ({stage.data_from}) has {tokenizer}; make the former at least as large."
                )

    def _check_sources(self, entry: LoadedEntry) -> None:
        """Compare the curriculum's sources with those of a data folder that the recipe names."""
        stage = entry.config.stage
        if isinstance(stage, PretrainConfig | DistillConfig) and names_a_folder(stage.data_from):
            ref = self._input(entry, "data_from")
            if ref is not None and ref.folder is not None and is_data_folder(ref.folder):
                check_sources(stage.curriculum, ref.folder, f"{entry.key_prefix}stage.curriculum")

    def _own_vocabulary(self, entry: LoadedEntry) -> int | None:
        stage = entry.config.stage
        if isinstance(stage, PretrainConfig) and not stage.architecture_from:
            return stage.model.vocab_size
        key = "architecture_from" if isinstance(stage, PretrainConfig) else "init_from"
        return self._checkpoint_vocabulary(self._input(entry, key))

    def _checkpoint_vocabulary(self, ref: InputRef | None) -> int | None:
        """Return the vocabulary of a checkpoint that exists or will be made, None where it cannot be known yet."""
        if ref is None:
            return None
        if ref.entry in self._entries:
            return self._own_vocabulary(self._entries[ref.entry])
        folder = self._folder(ref)
        if folder is None or not (folder / "config.json").is_file():
            return None
        try:
            size = json.loads((folder / "config.json").read_text(encoding="utf-8"))["vocab_size"]
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{shown_path(folder / 'config.json')} states no vocab_size ({error}).") from error
        return size if isinstance(size, int) else None

    def _data_vocabulary(self, ref: InputRef | None) -> int | None:
        if ref is None:
            return None
        if ref.entry in self._entries:
            stage = self._entries[ref.entry].config.stage
            return stage.corpus.vocab_size if isinstance(stage, PrepareConfig) else None
        folder = self._folder(ref)
        recipe = folder.parent / RECIPE_FILE if folder else None
        if recipe is None or not recipe.is_file():
            return None
        try:
            return int(yaml.safe_load(recipe.read_text(encoding="utf-8"))["stage"]["corpus"]["vocab_size"])
        except (yaml.YAMLError, KeyError, TypeError, ValueError):
            return None  # a note of ours about the folder; the stage itself compares the tokenizers

    def _model(self, entry: LoadedEntry) -> ModelConfig | None:
        """Return the largest architecture that an entry of this recipe can have."""
        stage = entry.config.stage
        if isinstance(stage, PretrainConfig) and not stage.architecture_from:
            return stage.model
        ref = self._input(entry, "architecture_from" if isinstance(stage, PretrainConfig) else "init_from")
        return self._model(self._entries[ref.entry]) if ref is not None and ref.entry in self._entries else None

    def _check_disk(self) -> None:
        """Compare the free disk with a rough count: fp32 weights for each checkpoint, and resumable states beside."""
        needed = 0
        for entry in self._recipe.entries:
            model = self._model(entry)
            if model is None or load_record(self._recipe.output_dir / entry.name) is not None:
                continue
            copies = 1
            if isinstance(entry.config.stage, TRAINING_STAGES):
                training = entry.config.stage.training
                kept_for_good = training.steps // training.keep_every if training.keep_every else 0
                copies += _STATE_TENSORS * (training.keep_last + 1 + kept_for_good)
            needed += copies * count_parameters(model) * _FP32_BYTES
        output_dir = self._recipe.output_dir.absolute()
        existing = next(path for path in (output_dir, *output_dir.parents) if path.exists())
        free = shutil.disk_usage(existing).free
        if needed > free:
            raise UserError(
                f"`output_dir` ({shown_path(self._recipe.output_dir)}) lies on a disk with {free / 1e9:.1f} GB free,"
                f" but the run needs about {needed / 1e9:.1f} GB; free some, or set another output_dir."
            )
