"""Turns a GPU that runs out of memory into one sentence with the options that would fit, from the plan's arithmetic."""

from types import TracebackType

import torch

from nanotrain.config.engine import EngineConfig
from nanotrain.config.errors import UserError
from nanotrain.config.model import ModelConfig
from nanotrain.config.training import TrainingConfig
from nanotrain.planning.parameters import count_parameters
from nanotrain.planning.training_memory import smaller_configurations, training_memory

USABLE_SHARE = 0.93
"""Of a GPU's memory; the rest is the driver's, the libraries' and lost between blocks."""
GIB = 2**30


class OutOfMemoryAdvice:
    """A context in which torch.OutOfMemoryError becomes a UserError."""

    def __init__(
        self, engine: EngineConfig, model: ModelConfig, training: TrainingConfig | None, device: torch.device
    ) -> None:
        self._engine, self._model, self._training, self._device = engine, model, training, device

    def __enter__(self) -> None:
        return None

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if not isinstance(error, torch.OutOfMemoryError):
            return
        name, total = "the device", 0
        if self._device.type == "cuda":
            properties = torch.cuda.get_device_properties(self._device)
            name, total = properties.name, properties.total_memory
        raise UserError(advice(self._engine, self._model, self._training, name, total)) from error


def advice(
    engine: EngineConfig, model: ModelConfig, training: TrainingConfig | None, name: str, total_bytes: int
) -> str:
    """Return the sentence.

    Args:
        engine: precision and checkpointing of the run that failed.
        model: its sizes.
        training: its batch and optimizer; None = an engine that does not train.
        name: of the GPU.
        total_bytes: its memory.
    """
    start = f"{name} ran out of memory ({total_bytes / GIB:.0f} GiB)"
    if training is None:
        return (
            f"{start}: the {count_parameters(model) / 1e9:.1f}B weights alone take {4 * count_parameters(model) / GIB:.0f}"
            " GiB in fp32; use a larger GPU, smaller batches, or a smaller model."
        )
    needed = training_memory(model, training, engine).peak / GIB
    smallest = needed
    for overrides, less_training, less_engine in smaller_configurations(training, engine):
        peak = training_memory(model, less_training, less_engine).peak
        smallest = min(smallest, peak / GIB)
        if peak <= USABLE_SHARE * total_bytes:
            return f"{start}: this run needs about {needed:.0f} GiB; `{overrides}` needs about {peak / GIB:.0f} GiB."
    return (
        f"{start}: this run needs about {needed:.0f} GiB and, with every option that saves memory, {smallest:.0f} GiB;"
        " use a larger GPU, a shorter `stage.training.sequence_length`, or a smaller model."
    )
