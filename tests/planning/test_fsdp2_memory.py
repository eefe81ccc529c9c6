"""Memory of a rank under FSDP2: against plain sums, and how its settings must change it."""

from collections.abc import Callable
from dataclasses import replace

from nanotrain.config.engine import ActivationCheckpointingConfig, EngineConfig, Precision
from nanotrain.config.model import ModelConfig
from nanotrain.config.parallel import DataParallel, Fsdp2Config
from nanotrain.config.training import TrainingConfig
from nanotrain.planning.fsdp2_memory import fsdp2_memory
from nanotrain.planning.parameters import count_parameters
from nanotrain.planning.training_memory import training_memory

TRAINING = TrainingConfig(steps=1, global_batch_size=8, micro_batch_size=1, sequence_length=8192, learning_rate=1e-4)
ENGINE = EngineConfig(precision=Precision.bf16, data_parallel=DataParallel.fsdp2)
EMBEDDINGS = 2 * 131072 * 5120


def test_ranks_divide_what_lasts_and_gather_the_rest(published: Callable[[str], ModelConfig]) -> None:
    model = published("12b")
    parameters = count_parameters(model)
    eight, four = (fsdp2_memory(model, replace(TRAINING, global_batch_size=n), ENGINE, n) for n in (8, 4))
    assert (eight.divided, eight.gradients) == (12 * parameters // 8, 4 * parameters // 8)
    assert four.divided == 2 * eight.divided
    mlp = 2 * 5120 * 20480  # the largest group: both matrices of an MLP layer
    assert eight.gathered == four.gathered == 4 * EMBEDDINGS + 2 * 2 * mlp
    assert eight.activations == training_memory(model, TRAINING, ENGINE).activations
    assert eight.last_reduction == 8 * EMBEDDINGS
    everything = ActivationCheckpointingConfig(mamba=True, mlp=True, attention=True)
    less = fsdp2_memory(model, TRAINING, replace(ENGINE, activation_checkpointing=everything), 8)
    assert less.activations < eight.activations / 3
    assert less.peak < eight.peak


def test_accumulation_keeps_whole_gradients_unless_each_is_reduced(published: Callable[[str], ModelConfig]) -> None:
    model, twice = published("9b"), replace(TRAINING, global_batch_size=16)
    parameters = count_parameters(model)
    assert fsdp2_memory(model, twice, ENGINE, 8).gradients == 4 * parameters
    always = replace(ENGINE, fsdp2=Fsdp2Config(reduce_every_micro_batch=True))
    assert fsdp2_memory(model, twice, always, 8).gradients == 4 * -(-parameters // 8)
    kept = replace(ENGINE, fsdp2=Fsdp2Config(reshard_after_forward=False))
    layers = parameters - 2 * 131072 * 4480
    assert fsdp2_memory(model, TRAINING, kept, 8).gathered == 4 * 2 * 131072 * 4480 + 2 * layers
