"""Megatron layouts in the order in which they are tried, and those that a number of ranks does not allow."""

from nanotrain.config.megatron import MegatronConfig


def megatron_layouts(size: int) -> tuple[dict[str, MegatronConfig], dict[str, str]]:
    """Return the layouts of `size` ranks by name, the most telling first, and why others are left out.

    What a layout does not use of the ranks is data-parallel, with the distributed optimizer but where the name says
    `whole`. In `sp` the sequence is split between the layers.
    """
    wanted = {
        f"tp{size} sp": MegatronConfig(tensor_parallel=size, sequence_parallel=True),
        f"cp{size}": MegatronConfig(context_parallel=size),
        "pp2": MegatronConfig(pipeline_parallel=2),
        f"dp{size}": MegatronConfig(),
        "tp2 pp2 sp": MegatronConfig(tensor_parallel=2, pipeline_parallel=2, sequence_parallel=True),
        "tp2 cp2 sp": MegatronConfig(tensor_parallel=2, context_parallel=2, sequence_parallel=True),
        "tp2 pp2 cp2 sp": MegatronConfig(
            tensor_parallel=2, pipeline_parallel=2, context_parallel=2, sequence_parallel=True
        ),
        f"tp{size}": MegatronConfig(tensor_parallel=size),
        f"dp{size} whole": MegatronConfig(distributed_optimizer=False, fp8_parameters=False),
        "pp4": MegatronConfig(pipeline_parallel=4),
        "tp2 sp": MegatronConfig(tensor_parallel=2, sequence_parallel=True),
        "cp2": MegatronConfig(context_parallel=2),
        "tp4 sp": MegatronConfig(tensor_parallel=4, sequence_parallel=True),
        "cp4": MegatronConfig(context_parallel=4),
        "pp2 cp2": MegatronConfig(pipeline_parallel=2, context_parallel=2),
    }
    allowed, left_out = {}, {}
    for name, layout in wanted.items():
        ranks = layout.tensor_parallel * layout.pipeline_parallel * layout.context_parallel
        if size % ranks:
            left_out[name] = f"needs {ranks} ranks"
        else:
            allowed[name] = layout
    return allowed, left_out
