"""What engines share whose model is spread over ranks behind one root module: forward passes without gradient, export."""

from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nanotrain.checkpoint.hf_folder import save_state_dict
from nanotrain.checkpoint.provenance import Provenance
from nanotrain.config.model import ModelConfig
from nanotrain.engines.base import Engine
from nanotrain.engines.data_parallel import LossSums, sum_count
from nanotrain.engines.root import label_log_probabilities
from nanotrain.losses.base import LossFn
from nanotrain.model.batch import MicroBatch
from nanotrain.planning.parameters import tensor_shapes
from nanotrain.runtime.distributed import World, wait_for_all


class RootEngine(Engine):
    """An engine whose every rank runs a root module (engines/root.py) on batches of its own."""

    _world: World

    @abstractmethod
    def _forward(self, batch: MicroBatch, *arguments: Any) -> Any:
        """Call the root outside a training step."""

    @abstractmethod
    def _evaluating(self) -> AbstractContextManager[None]:
        """Return the context of forward passes without gradient."""

    @torch.no_grad()
    def evaluate(self, microbatches: Iterable[MicroBatch], loss_fn: LossFn) -> dict[str, float]:
        sums, num_tokens = LossSums(), 0
        with self._evaluating():
            for batch in microbatches:
                num_tokens += int(loss_fn.denominator(batch))
                sums.add(self._forward(batch.to(self.device), loss_fn))
        num_tokens = sum_count(num_tokens, self._world)
        sums.reduce(self._world)
        return {**sums.metrics(), "loss": sums.loss_sum / max(num_tokens, 1), "num_tokens": num_tokens}

    @torch.no_grad()
    def hidden_states(self, microbatches: Sequence[MicroBatch]) -> list[Tensor | None]:
        with self._evaluating():
            return [self._forward(batch.to(self.device)) for batch in microbatches]

    @torch.no_grad()
    def logprobs(self, batch: MicroBatch) -> Tensor:
        with self._evaluating():
            return self._forward(batch.to(self.device), label_log_probabilities)


def meta_tensors(config: ModelConfig) -> dict[str, Tensor]:
    """Return the shapes of a model's tensors by name, in fp32, without storage."""
    return {name: torch.empty(shape, device="meta") for name, shape in tensor_shapes(config).items()}


def save_gathered(
    tensors: Mapping[str, Tensor],
    config: ModelConfig,
    folder: Path,
    gather: Callable[[str], Tensor | None],
    world: World,
    *,
    dtype: torch.dtype | None,
    tokenizer_from: Path | None,
    provenance: Provenance | None,
) -> None:
    """Write a checkpoint folder on the first rank, one gathered tensor after the other; every rank calls it.

    Args:
        tensors: name -> anything of the whole tensor's shape and dtype; not read.
        config: the architecture.
        folder: to write.
        gather: collective; returns the whole tensor of a name on the first rank.
        world: the ranks that call it; one alone waits for nobody.
        dtype: of the file, as the rest of the arguments in checkpoint.hf_folder.save_model.
    """
    if world.is_first:
        about: dict[str, Any] = {"dtype": dtype, "tokenizer_from": tokenizer_from, "provenance": provenance}
        save_state_dict(tensors, config, folder, gather=gather, **about)
    else:
        for name in tensor_shapes(config):
            gather(name)
    if world.size > 1:
        wait_for_all()
