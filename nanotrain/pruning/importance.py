"""Width importance from activations of forward passes: hidden channels, FFN neurons, Mamba-2 heads.

All scores are aggregates of |activation| over the sequence, then over the samples, then (hidden) over the layers:
mean(v) = sum |v_i| / n and l2(v) = sqrt(sum v_i^2). Sources: Minitron (arXiv 2407.14679), Nemotron Nano 2 section
4.1 (arXiv 2508.14444), and arXiv 2504.11409 for Mamba heads inside their groups.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from time import monotonic

import safetensors.torch
import torch
from torch import Tensor, nn
from tqdm import tqdm

from nanotrain.config.model import MAMBA, MLP, ModelConfig
from nanotrain.config.stage import Aggregation
from nanotrain.model.batch import MicroBatch
from nanotrain.model.hybrid import HybridModel
from nanotrain.pruning.forward import embed, final_norm, run_layers
from nanotrain.runtime.files import write_bytes_atomic

_BATCHES_DONE = "batches_done"


@dataclass(frozen=True)
class WidthScores:
    """Importance, higher = keep. Keys of the mappings are the parent's layer numbers; tensors are fp64 on the CPU."""

    hidden: Tensor
    """[D], one ranking for the whole model."""
    ffn: Mapping[int, Tensor]
    """[F] for each kept MLP layer."""
    mamba_heads: Mapping[int, Tensor]
    """[H] for each kept Mamba-2 layer, to be compared inside a group only."""


@dataclass(frozen=True)
class Aggregations:
    """How activations become one number a channel."""

    sequence: Aggregation
    batch: Aggregation

    def over_sequence(self, activations: Tensor) -> Tensor:
        """Aggregate [B, S, C] to [B, C], in fp64."""
        wide = activations.double()
        if self.sequence is Aggregation.mean:
            return wide.abs().mean(1)
        return wide.square().sum(1).sqrt()

    def batch_sum(self, per_sample: Tensor) -> Tensor:
        """Return this batch's share [C] of the sum over samples, from [B, C]."""
        return per_sample.sum(0) if self.batch is Aggregation.mean else per_sample.square().sum(0)

    def over_batch(self, total: Tensor, num_samples: int) -> Tensor:
        """Turn the sum over all samples into the aggregate."""
        return total / num_samples if self.batch is Aggregation.mean else total.sqrt()


def measure_width_importance(
    model: HybridModel,
    layers: Sequence[int],
    batches: Sequence[MicroBatch],
    aggregations: Aggregations,
    *,
    checkpoint: Path | None = None,
    save_interval_seconds: float = 5.0,
) -> WidthScores:
    """Score every width of the model that consists of `layers` of `model`, by forward passes over `batches`.

    Hidden channels are scored by the outputs of every norm over the residual stream (the final one too), neurons by
    relu(up(x))^2, Mamba-2 heads by the L2 norm over a head's channels of the x part of in_proj's output.

    Args:
        model: the parent, on any device, in any dtype.
        layers: kept layers; the others are skipped.
        batches: calibration data; every position counts, labels are not used.
        aggregations: over sequence and batch.
        checkpoint: file that holds the running sums, so that a restart repeats a few seconds; None = none.
        save_interval_seconds: between two writes of that file.
    """
    sums, done = _load_sums(checkpoint)
    last_saved = monotonic()
    for number, batch in enumerate(tqdm(batches, desc="width importance", unit="batch", dynamic_ncols=True)):
        if number < done:
            continue
        for name, value in _batch_sums(model, layers, batch, aggregations).items():
            sums[name] = sums[name] + value if name in sums else value
        if checkpoint is not None and monotonic() - last_saved >= save_interval_seconds:
            _save_sums(checkpoint, sums, number + 1)
            last_saved = monotonic()
    num_samples = sum(len(batch.input_ids) for batch in batches)
    return _scores(model.config, layers, {k: aggregations.over_batch(v, num_samples) for k, v in sums.items()})


@torch.no_grad()
def _batch_sums(
    model: HybridModel, layers: Sequence[int], batch: MicroBatch, aggregations: Aggregations
) -> dict[str, Tensor]:
    sums: dict[str, Tensor] = {}

    def add(name: str, activations: Tensor) -> None:
        assert name not in sums, name
        sums[name] = aggregations.batch_sum(aggregations.over_sequence(activations)).cpu()

    batch = batch.to(model.output_weight().device)
    with _capture(model, layers, add):
        final_norm(model, run_layers(model, embed(model, batch), layers, batch))
    expected = len(layers) + 1 + sum(model.config.hybrid_layer_pattern[layer] in (MAMBA, MLP) for layer in layers)
    assert len(sums) == expected, f"a layer bypassed the modules that hooks see: {sorted(sums)}"
    return sums


@contextmanager
def _capture(model: HybridModel, layers: Sequence[int], add: Callable[[str, Tensor], None]) -> Iterator[None]:
    """Hook norms, up_proj and in_proj for the time of one forward pass."""
    inner = model.config.mamba_inner_size

    def keep(name: str, transform: Callable[[Tensor], Tensor]) -> Callable[[nn.Module, object, Tensor], None]:
        return lambda _module, _inputs, output: add(name, transform(output))

    handles = [model.backbone.norm_f.register_forward_hook(keep("norm_f", lambda x: x))]
    for layer in layers:
        block = model.backbone.layers[layer]
        handles.append(block.norm.register_forward_hook(keep(f"norm.{layer}", lambda x: x)))
        kind = model.config.hybrid_layer_pattern[layer]
        if kind == MLP:
            hook = keep(f"ffn.{layer}", lambda up: torch.relu(up).square())
            handles.append(block.mixer.up_proj.register_forward_hook(hook))
        elif kind == MAMBA:
            hook = keep(f"mamba.{layer}", lambda zxbcdt: zxbcdt[..., inner : 2 * inner])
            handles.append(block.mixer.in_proj.register_forward_hook(hook))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _scores(config: ModelConfig, layers: Sequence[int], aggregated: Mapping[str, Tensor]) -> WidthScores:
    norms = [aggregated[f"norm.{layer}"] for layer in layers] + [aggregated["norm_f"]]
    kinds = config.hybrid_layer_pattern
    return WidthScores(
        hidden=torch.stack(norms).sum(0),
        ffn={layer: aggregated[f"ffn.{layer}"] for layer in layers if kinds[layer] == MLP},
        mamba_heads={
            layer: aggregated[f"mamba.{layer}"].view(config.mamba_num_heads, config.mamba_head_dim).norm(dim=1)
            for layer in layers
            if kinds[layer] == MAMBA
        },
    )


def _save_sums(file: Path, sums: Mapping[str, Tensor], batches_done: int) -> None:
    tensors = {name: value.contiguous() for name, value in sums.items()}
    write_bytes_atomic(file, safetensors.torch.save({**tensors, _BATCHES_DONE: torch.tensor(batches_done)}))


def _load_sums(file: Path | None) -> tuple[dict[str, Tensor], int]:
    if file is None or not file.exists():
        return {}, 0
    sums = safetensors.torch.load(file.read_bytes())
    return sums, int(sums.pop(_BATCHES_DONE))
