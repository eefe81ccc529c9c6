"""Supervised fine-tuning on chat with reasoning traces; some traces empty, some cut off (paper section 3)."""

from pathlib import Path

from nanotrain.checkpoint.hf_folder import load_config
from nanotrain.config.stage import SftConfig
from nanotrain.data.loader import SftLoader
from nanotrain.data.prefetch import PrefetchingLoader
from nanotrain.engines import build_engine
from nanotrain.losses.language_modeling import CrossEntropy
from nanotrain.model.hybrid import build_meta_model
from nanotrain.runtime.run import Run
from nanotrain.stages.training_products import check_vocabulary, held_out_callback, save_trained, tokenizer_folder
from nanotrain.training.loop import train


def sft(config: SftConfig, run: Run) -> Path:
    """Fine-tune the model of `init_from` on the prepared chat rows and return its checkpoint folder.

    Args:
        config: shape of the traces, budget.
        run: inputs `init_from`, `data_from`.
    """
    data = run.inputs["data_from"]
    architecture = load_config(run.inputs["init_from"])
    check_vocabulary(architecture, data, "stage.init_from")
    engine = build_engine(run.engine, build_meta_model(architecture), config.training)
    engine.load_hf(run.inputs["init_from"])
    loader = SftLoader(
        data,
        tokenizer_folder(data),
        config.reasoning,
        config.training,
        run.seed,
        dp_rank=engine.dp_rank,
        dp_size=engine.dp_size,
    )
    ahead = PrefetchingLoader(loader, config.training.steps)
    evaluate = held_out_callback(engine, data, config.training)
    summary = train(engine, ahead, CrossEntropy(), config.training, run, evaluate)
    return save_trained(
        engine,
        run,
        summary,
        config.training,
        tokenizer_from=tokenizer_folder(data),
        blend={"chat": 1.0},
        extra={"sft": loader.summary()},
    )
