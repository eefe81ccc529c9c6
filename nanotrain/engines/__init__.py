"""Chooses the engine; each is imported only when it is asked for, because each pulls in its own framework."""

from typing import TYPE_CHECKING

from nanotrain.config.engine import EngineConfig, EngineKind
from nanotrain.config.parallel import DataParallel
from nanotrain.config.training import TrainingConfig

if TYPE_CHECKING:
    from nanotrain.engines.base import Engine
    from nanotrain.model.hybrid import HybridModel


def build_engine(config: EngineConfig, model: "HybridModel", training: TrainingConfig | None = None) -> "Engine":
    """Return the engine of `config.kind` around `model`.

    Args:
        config: kind, device, precision, threads.
        model: weights in fp32; moved to the engine's device and cast to its dtype. Built under `torch.device("meta")` it
            gets its storage there, and its weights by `init_weights` or `load_hf`.
        training: optimizer settings; None = an engine that never trains (teacher, evaluation), without optimizer states.

    Raises:
        UserError: the engine cannot do what the config asks for.
    """
    from nanotrain.engines.data_parallel import require_ranks
    from nanotrain.runtime.distributed import start_ranks

    world = start_ranks()
    require_ranks(config, world)
    if config.kind is EngineKind.megatron:
        from nanotrain.engines.megatron_limits import require_megatron

        require_megatron()
        from nanotrain.engines.megatron_engine import MegatronEngine

        return MegatronEngine(config, model, training)
    if world.size > 1 and config.data_parallel is DataParallel.fsdp2:
        from nanotrain.engines.torch_parallel import Fsdp2Engine

        return Fsdp2Engine(config, model, training, world)
    from nanotrain.engines.torch_engine import TorchEngine

    return TorchEngine(config, model, training, world)


def build_local_engine(config: EngineConfig, model: "HybridModel") -> "Engine":
    """Return an engine of this one process that never trains: for stages that run on the first rank only.

    Args:
        config: device, precision, kernels and threads are used; how several ranks would share the work is not.
        model: as in `build_engine`.
    """
    from nanotrain.engines.torch_engine import TorchEngine

    return TorchEngine(config, model)
