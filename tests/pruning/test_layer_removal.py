"""Against rebuilt models: every candidate is sliced out, run whole, and its logits compared."""

import itertools

import pytest
import torch

from nanotrain.config.errors import UserError
from nanotrain.model.hybrid import HybridModel
from nanotrain.pruning.layer_removal import DepthTargets, output_gram, remove_layers, squared_logit_errors
from nanotrain.pruning.plan import PruningPlan
from nanotrain.pruning.slice import slice_state_dict
from nanotrain.runtime.progress import Progress


def without(model, removed):
    config, whole = model.config, PruningPlan.identity(model.config)
    plan = PruningPlan(
        tuple(i for i in whole.layers if i not in removed),
        whole.hidden,
        {i: one for i, one in whole.ffn.items() if i not in removed},
        {i: one for i, one in whole.mamba_heads.items() if i not in removed},
    )
    tensors, small = slice_state_dict(model.state_dict(), config, plan)
    result = HybridModel(small).to(model.output_weight().dtype).eval()
    result.load_state_dict(tensors)
    return result


@torch.no_grad()
def logit_mse(model, removed, batches):
    small = without(model, removed)
    squares = [
        (small(b.input_ids, b.segment_ids) - model(b.input_ids, b.segment_ids)).double().square().flatten()
        for b in batches
    ]
    return torch.cat(squares).mean().item()


def brute_force(model, batches, targets):
    removed, errors = [], []
    for _ in range(targets.num_removals):
        allowed = targets.removable(model.config.hybrid_layer_pattern, removed)
        scores = {layer: logit_mse(model, [*removed, layer], batches) for layer in allowed}
        removed.append(min(scores, key=lambda layer: (scores[layer], layer)))
        errors.append(scores[removed[-1]])
    return removed, errors


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_removals_equal_brute_force(tiny_config, random_model, batches, tmp_path, seed):
    config = tiny_config()
    model, data = random_model(config, seed), batches(config, seed=seed)
    targets = DepthTargets.from_search(config.hybrid_layer_pattern, [2], -1)
    removals = remove_layers(model, data, targets, Progress(tmp_path / "progress.jsonl"))
    layers, errors = brute_force(model, data, targets)
    assert [one.layer for one in removals] == layers
    assert [one.mse for one in removals] == pytest.approx(errors, rel=1e-9)
    assert [one.kind for one in removals] == [config.hybrid_layer_pattern[layer] for layer in layers]


@pytest.mark.parametrize("removed", [[], [3], [5, 0]])
def test_every_candidates_error(tiny_config, random_model, batches, removed):
    config = tiny_config()
    model, (batch, _) = random_model(config), batches(config)
    candidates = [layer for layer in range(6) if layer not in removed]
    errors = squared_logit_errors(model, batch, removed, candidates, output_gram(model.output_weight()))
    count = batch.input_ids.numel() * config.vocab_size
    for layer in candidates:
        assert errors[layer] / count == pytest.approx(logit_mse(model, [*removed, layer], [batch]), rel=1e-9)
    some = squared_logit_errors(model, batch, removed, candidates[1:2], output_gram(model.output_weight()))
    assert some == {candidates[1]: errors[candidates[1]]}


def test_fp32_and_tied_embeddings(tiny_config, random_model, batches):
    config = tiny_config(tie_word_embeddings=True)
    model, (batch, _) = random_model(config, dtype=torch.float32), batches(config)
    errors = squared_logit_errors(model, batch, [], [2], output_gram(model.output_weight()))
    mse = errors[2] / batch.input_ids.numel() / config.vocab_size
    assert mse == pytest.approx(logit_mse(model, [2], [batch]), rel=1e-4)


def test_a_layer_that_adds_nothing_goes_first(tiny_config, random_model, batches, tmp_path):
    config = tiny_config()
    model = random_model(config)
    with torch.no_grad():
        model.backbone.layers[4].mixer.down_proj.weight.zero_()
    targets = DepthTargets.from_search(config.hybrid_layer_pattern, [5], -1)
    (removal,) = remove_layers(model, batches(config), targets, Progress(tmp_path / "p.jsonl"))
    assert (removal.layer, removal.kind, removal.mse) == (4, "-", 0.0)


def test_a_restart_repeats_nothing_and_ends_the_same(tiny_config, random_model, batches, tmp_path, monkeypatch):
    config = tiny_config()
    model, data = random_model(config), batches(config)
    targets = DepthTargets.from_search(config.hybrid_layer_pattern, [4], -1)
    expected = remove_layers(model, data, targets, Progress(tmp_path / "whole.jsonl"))

    file = tmp_path / "cut.jsonl"
    lines = (tmp_path / "whole.jsonl").read_bytes().splitlines(keepends=True)
    assert len(lines) == 4  # two removals x two micro-batches
    for cut in range(5):
        file.write_bytes(b"".join(lines[:cut]) + b'{"key": "lay')
        calls = []
        forward = model.backbone.embeddings.forward
        with monkeypatch.context() as patch:
            patch.setattr(
                model.backbone.embeddings,
                "forward",
                lambda ids, calls=calls, forward=forward: (calls.append(1), forward(ids))[1],
            )
            assert remove_layers(model, data, targets, Progress(file)) == expected
        assert len(calls) == 4 - cut


def test_nothing_to_remove(tiny_config, random_model, batches, tmp_path):
    config = tiny_config()
    targets = DepthTargets.from_search(config.hybrid_layer_pattern, [], -1)
    assert remove_layers(random_model(config), batches(config), targets, Progress(tmp_path / "p.jsonl")) == []
    assert targets.kept_layers([]) == {6: (0, 1, 2, 3, 4, 5)}


class TestDepthTargets:
    def test_depths_are_nested(self):
        targets = DepthTargets.from_search("M-*M-M", [3, 5, 3], -1)
        assert targets.depths == (5, 3)
        assert targets.kept_layers([4, 0, 2]) == {5: (0, 1, 2, 3, 5), 3: (1, 3, 5)}

    @pytest.mark.parametrize("pattern", ["M-*M-*M*", "***-", "*-*-M", "M*"])
    def test_every_path_ends_with_the_wanted_attention(self, pattern):
        """All orders that `removable` allows, for all reachable targets, by brute force."""
        length, present = len(pattern), pattern.count("*")
        for stay, first in itertools.product(range(present + 1), range(1, length + 1)):
            for last in range(1, first + 1):
                if present - stay > length - first or last < stay:
                    with pytest.raises(UserError):
                        DepthTargets.from_search(pattern, [first, last], stay)
                    continue
                targets = DepthTargets.from_search(pattern, [first, last], stay)
                for order in paths(pattern, targets):
                    for kept in targets.kept_layers(order).values():
                        assert "".join(pattern[i] for i in kept).count("*") == stay

    def test_every_attention_layer_may_go_first(self):
        targets = DepthTargets.from_search("M-*M-*", [4], 1)
        assert set(targets.removable("M-*M-*", [])) == {0, 1, 2, 3, 4, 5}
        assert set(targets.removable("M-*M-*", [0])) == {2, 5}
        assert set(targets.removable("M-*M-*", [2])) == {0, 1, 3, 4}

    @pytest.mark.parametrize(
        "depths, attention, message",
        [
            ([7], -1, r"`stage.search.num_layers` \(\[7\]\) must lie between 1 and the parent's 6"),
            ([5], 3, r"`stage.search.num_attention_layers` \(3\) exceeds the 2 attention layers"),
            ([6], 1, "removes only 0 of 6 layers; lower num_layers to at most 5"),
            ([], 1, "removes only 0 of 6 layers"),
            ([1], 2, r"`stage.search.num_layers` \(1\) is below"),
        ],
    )
    def test_what_cannot_be_reached_is_refused(self, depths, attention, message):
        with pytest.raises(UserError, match=message):
            DepthTargets.from_search("M-*M-*", depths, attention)


def paths(pattern, targets, removed=()):
    if len(removed) == targets.num_removals:
        yield removed
        return
    allowed = targets.removable(pattern, removed)
    assert allowed
    for layer in allowed:
        yield from paths(pattern, targets, (*removed, layer))
