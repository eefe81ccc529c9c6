"""Shapes at the published sizes, values element by element, and exactness where what is cut contributes nothing."""

import pytest
import torch

from nanotrain.config.errors import UserError
from nanotrain.model.hybrid import HybridModel
from nanotrain.planning.parameters import tensor_shapes
from nanotrain.pruning.plan import PruningPlan
from nanotrain.pruning.slice import slice_state_dict


def plan_of(config, **kept) -> PruningPlan:
    """The identity with some fields replaced; `ffn` and `mamba_heads` may be one tuple for all kept layers."""
    whole = PruningPlan.identity(config)
    layers = kept.get("layers", whole.layers)
    ffn = {i: kept.get("ffn", one) for i, one in whole.ffn.items() if i in layers}
    heads = {i: kept.get("mamba_heads", one) for i, one in whole.mamba_heads.items() if i in layers}
    return PruningPlan(layers, kept.get("hidden", whole.hidden), ffn, heads)


def pruned(model: HybridModel, plan: PruningPlan) -> HybridModel:
    tensors, config = slice_state_dict(model.state_dict(), model.config, plan)
    result = HybridModel(config).to(model.output_weight().dtype).eval()
    result.load_state_dict(tensors, strict=True)
    return result


def logits(model, batch):
    with torch.no_grad():
        return model(batch.input_ids, batch.segment_ids)


def close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)


class TestPublished:
    @pytest.mark.parametrize("removed", [{7, 8, 17, 18, 48, 52}, {7, 8, 23, 24, 48, 52}])
    def test_the_12b_becomes_the_9b(self, published, removed):
        twelve, nine = published("12b"), published("9b")
        with torch.device("meta"):
            parent, child = HybridModel(twelve), HybridModel(nine)
        plan = plan_of(
            twelve,
            layers=tuple(i for i in range(62) if i not in removed),
            hidden=tuple(range(640, 5120)),
            ffn=tuple(range(15680)),
        )
        tensors, config = slice_state_dict(parent.state_dict(), twelve, plan)
        assert config == nine
        assert {name: one.shape for name, one in tensors.items()} == {k: v.shape for k, v in child.state_dict().items()}
        assert all(tensor.is_meta for tensor in tensors.values())

    def test_candidate_1_with_fewer_heads(self, published):
        twelve = published("12b")
        heads = tuple(head for head in range(128) if head % 16 < 14)
        plan = plan_of(twelve, hidden=tuple(range(4480)), ffn=tuple(range(17920)), mamba_heads=heads)
        with torch.device("meta"):
            tensors, config = slice_state_dict(HybridModel(twelve).state_dict(), twelve, plan)
        assert config.mamba_num_heads == 112
        assert {name: tuple(one.shape) for name, one in tensors.items()} == tensor_shapes(config)


def test_every_value_comes_from_where_it_should(tiny_config):
    """An index walk that is independent of the code: tensors whose values are their own coordinates."""
    config = tiny_config()
    plan = PruningPlan(
        layers=(1, 2, 3, 5), hidden=(1, 4, 5, 9), ffn={1: (0, 7, 19)}, mamba_heads={3: (1, 2, 5), 5: (0, 3, 4)}
    )
    coordinates = {
        name: torch.stack(torch.meshgrid(*[torch.arange(n) for n in shape], indexing="ij"), -1)
        for name, shape in tensor_shapes(config).items()
    }
    flat = {name: one.flatten(0, -2)[:, 0].view(one.shape[:-1]) * 1000 for name, one in coordinates.items()}
    flat = {n: f + (coordinates[n][..., 1] if coordinates[n].shape[-1] > 1 else 0) for n, f in flat.items()}
    result, _ = slice_state_dict(flat, config, plan)

    inner, groups_by_state, width = 30, 21, 5
    for new, old in enumerate(plan.layers):
        kind = config.hybrid_layer_pattern[old]
        get = lambda name, new=new: result[f"backbone.layers.{new}.mixer.{name}"].tolist()  # noqa: E731
        if kind == "-":
            assert get("up_proj.weight") == [[1000 * i + j for j in plan.hidden] for i in plan.ffn[old]]
            assert get("down_proj.weight") == [[1000 * i + j for j in plan.ffn[old]] for i in plan.hidden]
        if kind == "*":
            assert get("q_proj.weight") == [[1000 * i + j for j in plan.hidden] for i in range(24)]
            assert get("v_proj.weight") == [[1000 * i + j for j in plan.hidden] for i in range(12)]
            assert get("o_proj.weight") == [[1000 * i + j for j in range(24)] for i in plan.hidden]
        if kind == "M":
            heads = plan.mamba_heads[old]
            x = [h * width + p for h in heads for p in range(width)]
            bc = [inner + i for i in range(2 * groups_by_state)]
            dt = [2 * inner + 2 * groups_by_state + h for h in heads]
            rows = x + [inner + i for i in x] + [inner + i for i in bc] + dt
            assert get("in_proj.weight") == [[1000 * i + j for j in plan.hidden] for i in rows]
            assert get("conv1d.weight") == [[[1000 * i] * 3] for i in x + bc]
            assert get("conv1d.bias") == [1000 * i for i in x + bc]
            assert get("norm.weight") == [1000 * i for i in x]
            assert get("A_log") == get("D") == get("dt_bias") == [1000 * h for h in heads]
            assert get("out_proj.weight") == [[1000 * i + j for j in x] for i in plan.hidden]
        assert result[f"backbone.layers.{new}.norm.weight"].tolist() == [1000 * i for i in plan.hidden]
    assert result["backbone.norm_f.weight"].tolist() == [1000 * i for i in plan.hidden]
    for name in ("backbone.embeddings.weight", "lm_head.weight"):
        assert result[name].tolist() == [[1000 * i + j for j in plan.hidden] for i in range(40)]


class TestNothingLost:
    """Slices that contribute nothing leave the logits unchanged, in fp64."""

    def test_neurons_that_are_not_read(self, tiny_config, random_model, batches):
        config = tiny_config()
        model, (batch, _) = random_model(config), batches(config)
        kept = tuple(range(1, 20, 2))
        with torch.no_grad():
            for layer in (1, 4):
                model.backbone.layers[layer].mixer.down_proj.weight[:, ::2] = 0
        close(logits(pruned(model, plan_of(config, ffn=kept)), batch), logits(model, batch))

    def test_layers_that_add_nothing(self, tiny_config, random_model, batches):
        config = tiny_config()
        model, (batch, _) = random_model(config), batches(config)
        with torch.no_grad():
            model.backbone.layers[0].mixer.out_proj.weight.zero_()
            model.backbone.layers[2].mixer.o_proj.weight.zero_()
            model.backbone.layers[4].mixer.down_proj.weight.zero_()
        small = pruned(model, plan_of(config, layers=(1, 3, 5)))
        assert small.config.hybrid_layer_pattern == "-MM"
        close(logits(small, batch), logits(model, batch))

    @pytest.mark.parametrize("kept", [(1, 2, 5), (0, 3, 4)])
    def test_heads_that_are_silent(self, tiny_config, random_model, batches, kept):
        """A head whose gate is zero writes zeros; the group norm's mean then runs over half as many channels."""
        config = tiny_config()
        model, (batch, _) = random_model(config), batches(config)
        small = pruned(silence_heads(model, kept), plan_of(config, mamba_heads=kept))
        with torch.no_grad():
            for layer in (0, 3, 5):  # groups of 10 channels became groups of 5
                small.backbone.layers[layer].mixer.norm.weight *= (10 / 5) ** 0.5
        close(logits(small, batch), logits(model, batch))

    def test_hidden_channels_that_are_zero(self, tiny_config, random_model, batches):
        config = tiny_config()
        model, (batch, _) = random_model(config), batches(config)
        kept = (0, 2, 3, 7, 8, 10, 11)
        gone = [i for i in range(12) if i not in kept]
        with torch.no_grad():
            model.backbone.embeddings.weight[:, gone] = 0
            for index, output in enumerate(["out_proj", "down_proj", "o_proj", "out_proj", "down_proj", "out_proj"]):
                model.backbone.layers[index].mixer.get_parameter(f"{output}.weight")[gone] = 0
        small = pruned(model, plan_of(config, hidden=kept))
        rescale = (12 / 7) ** 0.5
        with torch.no_grad():
            for block in small.backbone.layers:
                block.norm.weight *= rescale
            small.backbone.norm_f.weight *= rescale
        close(logits(small, batch), logits(model, batch))

    def test_keeping_everything(self, tiny_config, random_model, batches):
        config = tiny_config()
        model, (batch, _) = random_model(config), batches(config)
        assert torch.equal(logits(pruned(model, PruningPlan.identity(config)), batch), logits(model, batch))


def silence_heads(model, kept):
    with torch.no_grad():
        for layer in (0, 3, 5):
            z = model.backbone.layers[layer].mixer.in_proj.weight[:30].view(6, 5, -1)
            for head in set(range(6)) - set(kept):
                z[head] = 0
    return model


def test_results_are_fresh_and_keep_dtype(tiny_config, random_model):
    config = tiny_config()
    model = random_model(config, dtype=torch.bfloat16)
    parent = model.state_dict()  # bf16, with A_log, D and dt_bias in fp32
    tensors, _ = slice_state_dict(parent, config, plan_of(config, layers=(0, 1)))
    before = model.backbone.embeddings.weight.clone()
    for name, tensor in tensors.items():
        assert tensor.dtype is parent[name].dtype
        tensor.zero_()
    assert torch.equal(model.backbone.embeddings.weight, before)


def test_tied_embeddings(tiny_config, random_model, batches):
    config = tiny_config(tie_word_embeddings=True)
    model, (batch, _) = random_model(config), batches(config)
    small = pruned(model, plan_of(config, hidden=(0, 1, 5)))
    assert torch.equal(small.output_weight(), model.output_weight()[:, [0, 1, 5]])
    assert logits(small, batch).shape == (3, 9, 40)


class TestRefusals:
    def test_a_missing_tensor(self, tiny_config, random_model):
        config = tiny_config()
        tensors = random_model(config).state_dict()
        del tensors["backbone.norm_f.weight"]
        with pytest.raises(UserError, match=r"lacks 'backbone.norm_f.weight'"):
            slice_state_dict(tensors, config, PruningPlan.identity(config))

    def test_an_unknown_tensor(self, tiny_config, random_model):
        config = tiny_config()
        tensors = random_model(config).state_dict() | {"backbone.layers.0.mixer.gate.weight": torch.zeros(1)}
        with pytest.raises(UserError, match=r"has 'backbone.layers.0.mixer.gate.weight'"):
            slice_state_dict(tensors, config, PruningPlan.identity(config))

    def test_a_tensor_of_another_shape(self, tiny_config, random_model):
        config = tiny_config()
        with pytest.raises(UserError, match=r"'backbone.embeddings.weight' has shape \(40, 12\) but .* \(41, 12\)"):
            slice_state_dict(
                random_model(config).state_dict(), tiny_config(vocab_size=41), PruningPlan.identity(config)
            )

    def test_a_plan_for_another_model(self, tiny_config, random_model):
        config = tiny_config()
        plan = PruningPlan.identity(tiny_config(hidden_size=13))
        with pytest.raises(UserError, match="holds 12, outside"):
            slice_state_dict(random_model(config).state_dict(), config, plan)
