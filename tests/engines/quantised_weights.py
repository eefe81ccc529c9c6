"""A stand-in for Transformer Engine's FP8 weights, which need a GPU, in states of Megatron-Core on a CPU rank."""

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from nanotrain.runtime.distributed import current_world


class Quantised(Tensor):
    """What is done to one is done to a dequantised copy, except for filling it; as with FP8 weights."""

    @staticmethod
    def __new__(cls, values: Tensor) -> "Quantised":
        made = Tensor._make_wrapper_subclass(cls, values.shape, dtype=values.dtype, device=values.device)
        made.values = values
        return made

    @classmethod
    def __torch_dispatch__(cls, function, types, arguments=(), options=None):
        if function is torch.ops.aten.copy_.default and isinstance(arguments[0], cls):
            arguments[0].values.copy_(arguments[1])
            return arguments[0]
        if function is torch.ops.aten.detach.default:
            return cls(arguments[0].values)
        plain = tree_map(lambda value: value.values.clone() if isinstance(value, cls) else value, (arguments, options))
        return function(*plain[0], **(plain[1] or {}))


def read_what_two_ranks_saved(folder: str) -> dict[str, bool]:
    """Save each rank's half of some weights; return which of them are read whole into a quantised one.

    One is read as it lies, the other in pieces that are put together again, as Mamba-2's input projection is.
    """
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.mapping import ShardedTensor
    from megatron.core.ssm.mamba_mixer import _split_tensor_factory

    from nanotrain.engines import megatron_model
    from tests import megatron_cpu

    megatron_cpu.install()
    megatron_model.is_float8tensor = lambda tensor: isinstance(tensor, Quantised)
    rank = current_world().rank
    generator = torch.Generator().manual_seed(0)
    saved = {name: torch.randn(8, 4, generator=generator) for name in ("whole", "joined.a", "joined.b")}
    mine = {name: tensor.chunk(2)[rank].clone() for name, tensor in saved.items()}
    dist_checkpointing.save(
        {name: ShardedTensor.from_rank_offsets(name, rows, (0, rank, 2)) for name, rows in mine.items()}, folder
    )

    weights = {"whole": Quantised(torch.zeros(8, 4)), "joined": Quantised(torch.zeros(16, 4))}
    wanted = {name: ShardedTensor.from_rank_offsets(name, weight, replica_id=rank) for name, weight in weights.items()}
    wanted["joined"] = _split_tensor_factory(wanted["joined"], [8, 8], ["a", "b"], 0)
    megatron_model.read_fp8_weights_unquantised(wanted)
    read = dist_checkpointing.load(wanted, folder)
    expected = {"whole": saved["whole"], "joined": torch.cat([saved["joined.a"], saved["joined.b"]])}
    for name, weight in weights.items():
        weight.copy_(read[name])
    return {name: weight.values.equal(expected[name]) for name, weight in weights.items()}
