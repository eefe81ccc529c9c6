"""Against explicit loops over samples, positions, layers and channels, on activations recomputed from the weights."""

import itertools

import pytest
import torch

from nanotrain.config.stage import Aggregation
from nanotrain.ops.rms_norm import rms_norm
from nanotrain.pruning.importance import Aggregations, measure_width_importance
from nanotrain.pruning.plan import PruningPlan
from nanotrain.pruning.slice import slice_state_dict

ALL = [Aggregations(sequence, batch) for sequence, batch in itertools.product(Aggregation, Aggregation)]
DEFAULT = Aggregations(Aggregation.mean, Aggregation.l2)


def looped(samples, aggregations: Aggregations) -> list[float]:
    """Aggregate [S, C] activations of each sample, one number at a time."""

    def aggregate(values, how):
        if how is Aggregation.mean:
            return sum(abs(v) for v in values) / len(values)
        return sum(v * v for v in values) ** 0.5

    channels = samples[0].shape[1]
    per_sample = [
        [aggregate(sample[:, c].tolist(), aggregations.sequence) for c in range(channels)] for sample in samples
    ]
    return [aggregate([one[c] for one in per_sample], aggregations.batch) for c in range(channels)]


def activations(model, layers, batches):
    """Return name -> one [S, C] tensor a sample, walking the layers by hand; one sample at a time."""
    result: dict[str, list] = {}
    config = model.config
    with torch.no_grad():
        for batch in batches:
            for row in range(len(batch.input_ids)):
                segments = batch.segment_ids[row : row + 1]
                hidden = model.backbone.embeddings.weight[batch.input_ids[row : row + 1]]
                for layer in layers:
                    block = model.backbone.layers[layer]
                    normed = rms_norm(hidden, block.norm.weight, config.layer_norm_epsilon)
                    result.setdefault(f"norm.{layer}", []).append(normed[0])
                    kind = config.hybrid_layer_pattern[layer]
                    if kind == "-":
                        up = normed[0] @ block.mixer.up_proj.weight.T
                        result.setdefault(f"ffn.{layer}", []).append(up.clamp(min=0) ** 2)
                    if kind == "M":
                        rows = block.mixer.in_proj.weight[30:60]  # after z, before B
                        result.setdefault(f"mamba.{layer}", []).append(normed[0] @ rows.T)
                    hidden = hidden + block.mixer(normed, segments, None, None)
                normed = rms_norm(hidden, model.backbone.norm_f.weight, config.layer_norm_epsilon)
                result.setdefault("norm_f", []).append(normed[0])
    return result


@pytest.mark.parametrize("aggregations", ALL, ids=lambda a: f"{a.sequence.value}-{a.batch.value}")
@pytest.mark.parametrize("layers", [(0, 1, 2, 3, 4, 5), (1, 2, 5)])
def test_all_scores(tiny_config, random_model, batches, aggregations, layers):
    config = tiny_config()
    model, data = random_model(config), batches(config)
    scores = measure_width_importance(model, layers, data, aggregations)
    seen = activations(model, layers, data)

    norms = [looped(seen[f"norm.{layer}"], aggregations) for layer in layers] + [looped(seen["norm_f"], aggregations)]
    assert scores.hidden.tolist() == pytest.approx([sum(channel) for channel in zip(*norms, strict=True)])
    assert sorted(scores.ffn) == [i for i in layers if config.hybrid_layer_pattern[i] == "-"]
    for layer, score in scores.ffn.items():
        assert score.tolist() == pytest.approx(looped(seen[f"ffn.{layer}"], aggregations))
    assert sorted(scores.mamba_heads) == [i for i in layers if config.hybrid_layer_pattern[i] == "M"]
    for layer, score in scores.mamba_heads.items():
        channels = looped(seen[f"mamba.{layer}"], aggregations)
        heads = [sum(c * c for c in channels[h * 5 : h * 5 + 5]) ** 0.5 for h in range(6)]
        assert score.tolist() == pytest.approx(heads)


def test_kept_layers_score_as_in_a_model_without_the_others(tiny_config, random_model, batches):
    config = tiny_config()
    model, data = random_model(config), batches(config)
    layers = (0, 2, 4, 5)
    whole = PruningPlan.identity(config)
    plan = PruningPlan(
        layers,
        whole.hidden,
        {i: one for i, one in whole.ffn.items() if i in layers},
        {i: one for i, one in whole.mamba_heads.items() if i in layers},
    )
    tensors, small_config = slice_state_dict(model.state_dict(), config, plan)
    small = random_model(small_config)
    small.load_state_dict(tensors)
    here = measure_width_importance(model, layers, data, DEFAULT)
    there = measure_width_importance(small, range(4), data, DEFAULT)
    assert torch.equal(here.hidden, there.hidden)
    for mine, other in ((here.ffn, there.ffn), (here.mamba_heads, there.mamba_heads)):
        assert all(torch.equal(score, other[layers.index(layer)]) for layer, score in mine.items())


def test_the_split_into_batches_does_not_matter(tiny_config, random_model, batches):
    config = tiny_config()
    model = random_model(config)
    whole = batches(config, sizes=(5,))
    split = [type(whole[0])(*(part[r] for part in (whole[0].input_ids, whole[0].labels, whole[0].segment_ids)))
             for r in (slice(0, 2), slice(2, 3), slice(3, 5))]  # fmt: skip
    for aggregations in ALL:
        one = measure_width_importance(model, range(6), whole, aggregations)
        three = measure_width_importance(model, range(6), split, aggregations)
        torch.testing.assert_close(one.hidden, three.hidden, rtol=1e-12, atol=0)
        torch.testing.assert_close(one.ffn[1], three.ffn[1], rtol=1e-12, atol=0)


class Killed(Exception):
    pass


def test_a_killed_measurement_resumes_to_the_same_bits(tiny_config, random_model, batches, tmp_path, monkeypatch):
    config = tiny_config()
    model, data = random_model(config), batches(config, sizes=(2, 2, 2, 1))
    expected = measure_width_importance(model, range(6), data, DEFAULT)

    class Breaking(list):
        def __iter__(self):
            yield from self[:2]
            raise Killed

    file = tmp_path / "importance.safetensors"
    with pytest.raises(Killed):
        measure_width_importance(model, range(6), Breaking(data), DEFAULT, checkpoint=file, save_interval_seconds=0)
    assert file.exists()

    done = []
    original = model.backbone.embeddings.forward
    monkeypatch.setattr(model.backbone.embeddings, "forward", lambda ids: (done.append(len(ids)), original(ids))[1])
    resumed = measure_width_importance(model, range(6), data, DEFAULT, checkpoint=file, save_interval_seconds=0)
    assert done == [2, 1]
    assert torch.equal(resumed.hidden, expected.hidden)
    assert torch.equal(resumed.ffn[4], expected.ffn[4])
    assert torch.equal(resumed.mamba_heads[5], expected.mamba_heads[5])


def test_no_hook_stays_behind(tiny_config, random_model, batches):
    config = tiny_config()
    model = random_model(config)
    measure_width_importance(model, range(6), batches(config), DEFAULT)
    assert not any(module._forward_hooks for module in model.modules())
