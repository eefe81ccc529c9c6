"""Plans the training entries of a recipe without running anything."""

from nanotrain.config.engine import EngineKind
from nanotrain.config.errors import UserError
from nanotrain.config.load import LoadedRecipe
from nanotrain.config.stage import TRAINING_STAGES
from nanotrain.pipeline.architectures import Architectures
from nanotrain.pipeline.inputs import resolve_inputs
from nanotrain.planning.layout import check_ranks
from nanotrain.planning.overview import overview
from nanotrain.runtime.distributed import current_world


def plan_recipe(recipe: LoadedRecipe, ranks: int | None) -> list[str]:
    """Return lines of text about every training entry.

    Args:
        recipe: composed and validated.
        ranks: GPUs that the run would have; None = those of the launcher, for Megatron at least one copy of the model.

    Raises:
        UserError: nothing in the recipe trains, or an entry cannot run on so many ranks.
    """
    known = Architectures(recipe, resolve_inputs(recipe, with_data=False))
    lines: list[str] = []
    for entry in recipe.entries:
        stage, engine = entry.config.stage, entry.config.engine
        if not isinstance(stage, TRAINING_STAGES):
            continue
        lines += [""] if lines else []
        lines.append(f"{entry.name}: engine {engine.kind.value}, {engine.precision.value}")
        model, path = known.trained(entry), f"{entry.key_prefix}stage.training"
        if ranks is not None or current_world().size > 1:
            models = [one for one in (model, known.teacher(entry)) if one is not None]
            check_ranks(models, stage.training, engine, ranks or current_world().size, training_path=path)
        if model is None:
            lines.append("model    is known when the entry that makes it has run")
            continue
        world_size = ranks or current_world().size
        if ranks is None and engine.kind is EngineKind.megatron:
            megatron = engine.megatron
            copy = megatron.tensor_parallel * megatron.pipeline_parallel * megatron.context_parallel
            world_size = max(world_size, copy)
        lines += overview(model, stage.training, engine, world_size, path)
    if not lines:
        raise UserError(f"{recipe.file} trains nothing; give a recipe with a pretrain, distill or sft stage.")
    return lines
