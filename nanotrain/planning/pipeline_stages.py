"""Which layers and vocabulary rows a model-parallel rank holds."""

from itertools import accumulate, pairwise

from nanotrain.config.megatron import MegatronConfig


def layers_per_stage(num_layers: int, megatron: MegatronConfig) -> list[int]:
    """Return the layers of each pipeline stage: as configured, else even.

    What is left over goes to the stages in the middle first, then to the first; the last one also has the output head.
    """
    if megatron.pipeline_layers:
        return list(megatron.pipeline_layers)
    stages = megatron.pipeline_parallel
    least, left_over = divmod(num_layers, stages)
    takers = [*range(1, stages - 1), 0][:left_over]
    return [least + (stage in takers) for stage in range(stages)]


def stage_layers(num_layers: int, megatron: MegatronConfig) -> list[range]:
    """Return the 0-based global layer indices of each pipeline stage."""
    starts = accumulate(layers_per_stage(num_layers, megatron), initial=0)
    return [range(start, stop) for start, stop in pairwise(starts)]


def padded_vocab_size(vocab_size: int, tensor_parallel: int) -> int:
    """Return the rows of the embeddings that split evenly: at most tensor_parallel - 1 of them are padding."""
    return -(-vocab_size // tensor_parallel) * tensor_parallel
