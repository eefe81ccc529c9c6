"""Memory of one rank of the torch engine under FSDP2: what is divided, and what is whole for a moment.

Between steps a rank holds its part of fp32 weights, gradients and both moments. Within a step the root's group (embeddings,
output head) is whole in fp32 from the forward pass to the end of the backward pass, layers come and go.
"""

import math
from dataclasses import dataclass

from nanotrain.config.engine import FP8_PRECISIONS, EngineConfig, Precision
from nanotrain.config.model import MAMBA, ModelConfig
from nanotrain.config.training import TrainingConfig
from nanotrain.planning.parameters import count_parameters, embedding_parameters, mixer_shapes
from nanotrain.planning.training_memory import training_memory

PREFETCHED = 2
"""Groups of a layer's matrices that are whole at a time: the one that runs and the next one."""


@dataclass(frozen=True)
class Fsdp2Memory:
    """Bytes of a rank."""

    divided: int
    """Its part of weights and moments."""
    gradients: int
    """Its part of them; all of them where micro-batches accumulate without being reduced."""
    gathered: int
    """Embeddings and head in fp32, layers that run in the dtype of the products, and the FP8 copies of one in use."""
    activations: int
    workspace: int
    """Of the loss with its copy of the head, or of a layer and its gradient on the way to be reduced."""
    last_reduction: int
    """Gradients of embeddings and head, and the buffer they are reduced from, when activations are gone."""

    @property
    def peak(self) -> int:
        """The most that exists at a time; the CUDA context, NCCL's buffers and fragmentation come on top."""
        passing = self.activations + self.workspace
        return self.divided + self.gathered + max(passing, self.gradients + self.last_reduction)


def fsdp2_memory(model: ModelConfig, training: TrainingConfig, engine: EngineConfig, ranks: int) -> Fsdp2Memory:
    """Estimate the bytes of one optimizer step on one of `ranks` GPUs.

    Args:
        model: sizes.
        training: batch sizes and sequence length; weights and states are fp32 under FSDP2.
        engine: precision (auto counts as bf16), activation checkpointing, `engine.fsdp2`.
        ranks: that divide the model.
    """
    alone = training_memory(model, training, engine)
    parameters, outer = count_parameters(model), embedding_parameters(model)
    value = 4 if engine.precision is Precision.fp32 else 2
    group = max(_largest_group(model, kind) for kind in model.hybrid_layer_pattern)
    accumulates = training.global_batch_size > training.micro_batch_size * ranks
    whole_gradients = accumulates and not engine.fsdp2.reduce_every_micro_batch
    layers = group * PREFETCHED if engine.fsdp2.reshard_after_forward else parameters - outer
    copies = 2 * group if engine.precision in FP8_PRECISIONS else 0  # a byte for each direction of the product
    return Fsdp2Memory(
        divided=12 * -(-parameters // ranks),
        gradients=4 * (parameters if whole_gradients else -(-parameters // ranks)),
        gathered=4 * outer + value * layers + copies,
        activations=alone.activations,
        workspace=max(alone.workspace, (value + 4) * group),
        last_reduction=0 if ranks == 1 else 8 * outer,
    )


def _largest_group(model: ModelConfig, kind: str) -> int:
    """Return the values of the largest group of a layer's matrices; a Mamba-2 layer has two (engines/torch_parallel.py)."""
    sizes = [math.prod(shape) for shape in mixer_shapes(model, kind).values() if len(shape) == 2]
    return max(sizes) if kind == MAMBA else sum(sizes)
