"""Running a choice of layers against a model that is built with just those."""

import dataclasses

import torch

from nanotrain.model.hybrid import HybridModel
from nanotrain.pruning.forward import embed, final_norm, run_layers


@torch.no_grad()
def test_equals_the_model_that_has_only_these_layers(tiny_config, random_model, batches):
    config = tiny_config()
    model, batch = random_model(config), batches(config)[0]
    kept = [0, 2, 3, 5]
    pattern = "".join(config.hybrid_layer_pattern[layer] for layer in kept)
    small = HybridModel(dataclasses.replace(config, hybrid_layer_pattern=pattern)).double()
    state = {name: tensor for name, tensor in model.state_dict().items() if ".layers." not in name}
    for new, old in enumerate(kept):
        for name, tensor in model.backbone.layers[old].state_dict().items():
            state[f"backbone.layers.{new}.{name}"] = tensor
    small.load_state_dict(state)
    hidden = final_norm(model, run_layers(model, embed(model, batch), kept, batch))
    assert torch.equal(hidden, small.hidden_states(batch.input_ids, batch.segment_ids))
