"""Run part of a model's layers: what a depth-pruned model computes, without building it."""

from collections.abc import Iterable

from torch import Tensor

from nanotrain.model.batch import MicroBatch
from nanotrain.model.hybrid import HybridModel


def embed(model: HybridModel, batch: MicroBatch) -> Tensor:
    """Return the residual stream before the first layer, [B, S, D]."""
    return model.backbone.embeddings(batch.input_ids)


def run_layers(model: HybridModel, hidden: Tensor, layers: Iterable[int], batch: MicroBatch) -> Tensor:
    """Send `hidden` [B, S, D] through the layers with the given indices, in that order."""
    for layer in layers:
        hidden = model.backbone.layers[layer](hidden, batch.segment_ids)
    return hidden


def final_norm(model: HybridModel, hidden: Tensor) -> Tensor:
    """Return what the output matrix is applied to, [B, S, D]."""
    return model.backbone.norm_f(hidden)
