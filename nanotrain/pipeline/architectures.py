"""Which model an entry trains, as far as it is known before anything runs."""

from nanotrain.checkpoint.config_json import CONFIG_FILE, from_json, read_config_json
from nanotrain.config.load import LoadedEntry, LoadedRecipe
from nanotrain.config.model import ModelConfig
from nanotrain.config.stage import DistillConfig, PretrainConfig, SftConfig
from nanotrain.pipeline.inputs import InputRef
from nanotrain.pipeline.products import load_record


class Architectures:
    """Follows the inputs of a recipe's entries to the recipe or the checkpoint that states the model."""

    def __init__(self, recipe: LoadedRecipe, inputs: dict[str, list[InputRef]]) -> None:
        self._recipe = recipe
        self._inputs = inputs
        self._entries = {entry.name: entry for entry in recipe.entries}

    def trained(self, entry: LoadedEntry) -> ModelConfig | None:
        """Return the model of a training entry; None where a stage that has not run decides it (prune).

        Raises:
            UserError: a checkpoint's config.json cannot be read.
        """
        stage = entry.config.stage
        if isinstance(stage, PretrainConfig):
            return self._of(entry, "architecture_from") if stage.architecture_from else stage.model
        return self._of(entry, "init_from") if isinstance(stage, DistillConfig | SftConfig) else None

    def teacher(self, entry: LoadedEntry) -> ModelConfig | None:
        """Return the teacher of a distillation; None where there is none, or as for `trained`."""
        return self._of(entry, "teacher_from") if isinstance(entry.config.stage, DistillConfig) else None

    def _of(self, entry: LoadedEntry, key: str) -> ModelConfig | None:
        ref = next((ref for ref in self._inputs[entry.name] if ref.key == key), None)
        if ref is None:
            return None
        if ref.entry in self._entries:
            return self.trained(self._entries[ref.entry])
        folder = ref.folder
        if folder is None:
            record = load_record(self._recipe.output_dir / ref.entry)
            folder = record.product_path(self._recipe.output_dir / ref.entry) if record else None
        if folder is None or not (folder / CONFIG_FILE).is_file():
            return None
        return from_json(read_config_json(folder), folder / CONFIG_FILE)
