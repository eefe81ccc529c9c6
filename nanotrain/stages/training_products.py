"""What the training stages share: held-out numbers during training, and the checkpoint folder at its end."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from nanotrain.checkpoint.hf_folder import load_config, load_model, load_tokenizer
from nanotrain.checkpoint.provenance import Provenance
from nanotrain.config.errors import UserError
from nanotrain.config.model import ModelConfig
from nanotrain.config.training import TrainingConfig
from nanotrain.data.manifest import DataFolder
from nanotrain.engines.base import Engine
from nanotrain.evaluation.held_out import held_out_bits_per_byte
from nanotrain.planning.parameters import count_parameters
from nanotrain.runtime.files import file_digest, folder_digest, write_json_atomic
from nanotrain.runtime.run import Run
from nanotrain.training.loop import TrainingSummary

PRODUCT = "hf"
RESULTS = "results.json"
_PREFIX = "held_out/"


def tokenizer_folder(data_folder: Path) -> Path:
    """Return the tokenizer of a prepared data folder."""
    return data_folder / "tokenizer"


def check_vocabulary(model: ModelConfig, data_folder: Path, where: str) -> None:
    """Refuse a model whose vocabulary cannot hold the data's token ids.

    Raises:
        UserError: the sizes differ, or the tokenizer is not the one that made the data.
    """
    DataFolder(data_folder).check_tokenizer(tokenizer_folder(data_folder))
    size = len(load_tokenizer(tokenizer_folder(data_folder)))
    if size > model.vocab_size:
        raise UserError(
            f"`{where}` has a vocabulary of {model.vocab_size}, the tokenizer of {data_folder} has {size}; prepare the"
            f" data with `stage.corpus.vocab_size={model.vocab_size}` or give the model {size} tokens."
        )


def held_out_callback(engine: Engine, data_folder: Path, training: TrainingConfig) -> Callable[[], dict[str, float]]:
    """Return a function that scores the held-out text and gives flat names for metrics.jsonl."""

    def evaluate() -> dict[str, float]:
        scores = held_out_bits_per_byte(
            engine,
            data_folder,
            sequence_length=training.sequence_length,
            micro_batch_size=training.micro_batch_size,
            max_tokens=training.evaluation_tokens,
        )
        bits = {f"{_PREFIX}bits_per_byte/{name}": value for name, value in scores["bits_per_byte"].items()}
        return {f"{_PREFIX}loss": scores["loss"], f"{_PREFIX}average": scores["average"], **bits}

    return evaluate


def nested_held_out(flat: dict[str, float]) -> dict[str, Any]:
    """Return held-out numbers in the form of `held_out_bits_per_byte`, from their flat names."""
    start = f"{_PREFIX}bits_per_byte/"
    bits = {name.removeprefix(start): value for name, value in flat.items() if name.startswith(start)}
    return {"bits_per_byte": bits, "average": flat[f"{_PREFIX}average"], "loss": flat[f"{_PREFIX}loss"]}


def blend_shares(samples: dict[str, int]) -> dict[str, float]:
    """Return source -> share of the samples."""
    total = sum(samples.values())
    return {source: count / total for source, count in samples.items()}


def save_trained(
    engine: Engine,
    run: Run,
    summary: TrainingSummary,
    training: TrainingConfig,
    *,
    tokenizer_from: Path,
    blend: dict[str, float],
    extra: dict[str, Any],
) -> Path:
    """Write the checkpoint folder, prove that it loads, and write results.json.

    Args:
        engine: holds the trained weights.
        run: this entry.
        summary: of the loop.
        training: the plan.
        tokenizer_from: tokenizer folder that goes with the weights.
        blend: source -> share of the samples.
        extra: further results of the stage.

    Returns:
        The folder.
    """
    folder = run.folder / PRODUCT
    held_out = nested_held_out(summary.evaluation)
    engine.save_hf(
        folder,
        tokenizer_from=tokenizer_from,
        provenance=Provenance(
            stage=run.entry,
            seed=run.seed,
            step=summary.steps,
            tokens_seen=summary.tokens,
            metrics={"held_out_bits_per_byte": held_out["average"], "final_loss": summary.final_loss},
            **parent_of(run),
        ),
    )
    _verify(engine, folder)
    results = {
        "parameters": count_parameters(engine.model_config),
        "steps": summary.steps,
        "tokens": summary.tokens,
        "planned_tokens": training.steps * training.tokens_per_step,
        "final_loss": summary.final_loss,
        "held_out": held_out,
        "skipped_steps": summary.skipped_steps,
        "training_seconds": summary.seconds,
        "blend": blend,
        **extra,
    }
    write_json_atomic(run.folder / RESULTS, results)
    return folder


def parent_of(run: Run) -> dict[str, str]:
    """Return the provenance fields that say what this entry was made from."""
    fields = {}
    recipe = run.folder / "recipe.yaml"
    if recipe.exists():
        fields["recipe_digest"] = file_digest(recipe)
    if "init_from" in run.inputs:
        parent = run.inputs["init_from"]
        fields |= {"parent": parent.as_posix(), "parent_digest": folder_digest(parent)}
    return fields


def _verify(engine: Engine, folder: Path) -> None:
    """Assert that the folder holds the engine's weights, bit for bit, and its architecture."""
    assert load_config(folder) == engine.model_config, f"{folder} was written with another architecture"
    with engine.inference_model() as model:
        trained = model.state_dict()
        stored = load_model(folder).state_dict()
        for name, tensor in trained.items():  # bf16 matrices beside fp32 vectors: fp32 holds both
            assert tensor.to("cpu", stored[name].dtype).equal(stored[name]), (
                f"{folder}: {name} differs from the trained weights"
            )
