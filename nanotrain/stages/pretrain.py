"""Pretraining: next-token prediction from random weights, over a curriculum of blends."""

from pathlib import Path

from nanotrain.checkpoint.hf_folder import load_config
from nanotrain.config.stage import PretrainConfig
from nanotrain.data.blend_folder import check_caps
from nanotrain.data.loader import PretrainLoader
from nanotrain.data.manifest import check_sources
from nanotrain.data.prefetch import PrefetchingLoader
from nanotrain.engines import build_engine
from nanotrain.losses.language_modeling import CrossEntropy
from nanotrain.model.hybrid import build_meta_model
from nanotrain.runtime.run import Run
from nanotrain.runtime.seeding import derived_seed
from nanotrain.stages.training_products import (
    blend_shares,
    check_vocabulary,
    held_out_callback,
    save_trained,
    tokenizer_folder,
)
from nanotrain.training.loop import train


def pretrain(config: PretrainConfig, run: Run) -> Path:
    """Train a model from random weights and return its checkpoint folder.

    Args:
        config: model (or `architecture_from`), curriculum, budget.
        run: inputs `data_from`, and `architecture_from` for a from-scratch baseline.
    """
    data = run.inputs["data_from"]
    architecture = load_config(run.inputs["architecture_from"]) if config.architecture_from else config.model
    check_vocabulary(architecture, data, "stage.model")
    check_sources(config.curriculum, data, "stage.curriculum")
    engine = build_engine(run.engine, build_meta_model(architecture), config.training)
    engine.init_weights(derived_seed(run.seed, "weights"))
    loader = PretrainLoader(
        data, config.curriculum, config.training, run.seed, dp_rank=engine.dp_rank, dp_size=engine.dp_size
    )
    check_caps(config.curriculum, loader.epochs(), "stage.curriculum")
    ahead = PrefetchingLoader(loader, config.training.steps)
    evaluate = held_out_callback(engine, data, config.training)
    summary = train(engine, ahead, CrossEntropy(), config.training, run, evaluate)
    return save_trained(
        engine,
        run,
        summary,
        config.training,
        tokenizer_from=tokenizer_folder(data),
        blend=blend_shares(loader.plan()),
        extra={"epochs": loader.epochs()},
    )
