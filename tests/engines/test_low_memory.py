"""Low-precision optimizers, the optimizer in the backward pass and activation checkpointing, on the CPU."""

import copy
import gc
import weakref
from dataclasses import replace

import pytest
import torch

from nanotrain.config.engine import ActivationCheckpointingConfig, Device, EngineConfig, Precision
from nanotrain.config.errors import UserError
from nanotrain.config.training import OptimizerConfig, ParameterDtype, StateDtype, TrainingConfig
from nanotrain.engines import build_engine
from nanotrain.engines.out_of_memory import OutOfMemoryAdvice, advice
from nanotrain.losses.language_modeling import CrossEntropy
from nanotrain.model.hybrid import HybridModel
from tests.conftest import TINY

FP32 = EngineConfig(device=Device.cpu, precision=Precision.fp32)
BF16 = EngineConfig(device=Device.cpu, precision=Precision.bf16)
WIDE = replace(TINY, hidden_size=64, vocab_size=128)  # tensors large enough for 8-bit states


def training(rows=2, **optimizer) -> TrainingConfig:
    return TrainingConfig(
        steps=9, global_batch_size=rows, micro_batch_size=2, sequence_length=12, learning_rate=1e-2,
        optimizer=OptimizerConfig(**optimizer),
    )  # fmt: skip


def wide_model() -> HybridModel:
    model = HybridModel(WIDE)
    model.init_weights(0)
    return model


def weights(engine) -> dict[str, torch.Tensor]:
    with engine.inference_model() as model:
        return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_same_weights(one, other) -> None:
    a, b = weights(one), weights(other)
    assert all(tensor.equal(b[name]) for name, tensor in a.items())


@pytest.mark.parametrize(("states", "rel"), [(StateDtype.bf16, 1e-3), (StateDtype.int8, 3e-3)])
def test_narrow_states_train_like_fp32(make_batch, states, rel):
    plain, narrow = (build_engine(FP32, wide_model(), training(state_dtype=kind)) for kind in (StateDtype.fp32, states))
    for step in range(6):
        batch = make_batch(2, step)
        a, b = (e.train_step([batch], CrossEntropy(), 1e-2) for e in (plain, narrow))
        assert b.loss == pytest.approx(a.loss, rel=rel)


def test_bf16_matrices_train_like_fp32_beside_vectors_that_stay_wide(make_batch):
    plain = build_engine(BF16, wide_model(), training())
    narrow = build_engine(
        BF16, wide_model(), training(state_dtype=StateDtype.int8, parameter_dtype=ParameterDtype.bf16)
    )
    for step in range(6):
        a, b = (e.train_step([make_batch(2, step)], CrossEntropy(), 1e-2) for e in (plain, narrow))
        assert b.loss == pytest.approx(a.loss, rel=0.02)
        assert b.grad_norm == pytest.approx(a.grad_norm, rel=0.1)
    for name, tensor in weights(narrow).items():
        assert tensor.dtype == (torch.bfloat16 if tensor.ndim == 2 else torch.float32), name


@pytest.mark.parametrize("parameters", list(ParameterDtype))
@pytest.mark.parametrize("states", list(StateDtype))
def test_optimizer_in_backward_equals_the_step_after_it(make_batch, states, parameters):
    low = {"state_dtype": states, "parameter_dtype": parameters, "gradient_clip": 0.0}
    after = build_engine(BF16, wide_model(), training(**low))
    within = build_engine(BF16, wide_model(), training(**low, in_backward=True))
    for step in range(3):
        a, b = (e.train_step([make_batch(2, step)], CrossEntropy(), 1e-2) for e in (after, within))
        assert a.loss == pytest.approx(b.loss, rel=1e-6)
        assert a.grad_norm == pytest.approx(b.grad_norm, rel=1e-5)
    if states is not StateDtype.fp32 or parameters is ParameterDtype.bf16:  # else torch's fused AdamW is the other side
        assert_same_weights(after, within)
    with within.inference_model() as model:
        assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("in_backward", [False, True])
def test_state_round_trip_continues_bit_for_bit(make_batch, tmp_path, in_backward):
    config = training(
        state_dtype=StateDtype.int8, parameter_dtype=ParameterDtype.bf16, in_backward=in_backward, gradient_clip=0.0
    )
    engine = build_engine(BF16, wide_model(), config)
    engine.train_step([make_batch(2, 1)], CrossEntropy(), 1e-2)
    engine.save_state(tmp_path)
    other = build_engine(BF16, HybridModel(WIDE), config)
    other.init_weights(9)
    other.load_state(tmp_path)
    torch.manual_seed(5)  # the rounding noise must not come from here
    for step in (2, 3):
        a, b = (e.train_step([make_batch(2, step)], CrossEntropy(), 1e-2) for e in (engine, other))
        assert (a.loss, a.grad_norm) == (b.loss, b.grad_norm)
    assert_same_weights(engine, other)


class Poisoned(CrossEntropy):
    """A loss that is not a number."""

    def __call__(self, head, batch):
        output = super().__call__(head, batch)
        return output._replace(loss_sum=output.loss_sum * float("nan"))


@pytest.mark.parametrize("in_backward", [False, True])
def test_a_loss_that_is_not_finite_changes_nothing(make_batch, in_backward):
    config = training(state_dtype=StateDtype.int8, in_backward=in_backward, gradient_clip=0.0)
    engine = build_engine(FP32, wide_model(), config)
    twin = build_engine(FP32, wide_model(), config)
    for each in (engine, twin):
        each.train_step([make_batch(2, 1)], CrossEntropy(), 1e-2)
    assert engine.train_step([make_batch(2, 2)], Poisoned(), 1e-2).skipped
    assert_same_weights(engine, twin)
    for each in (engine, twin):  # nor the moments, nor the count of steps
        assert not each.train_step([make_batch(2, 3)], CrossEntropy(), 1e-2).skipped
    assert_same_weights(engine, twin)


def test_a_gradient_that_is_not_finite_stops_at_its_layer(make_batch):
    """With the optimizer in the backward pass: what was updated before it stays, nothing after it is touched."""
    engine = build_engine(FP32, wide_model(), training(in_backward=True, gradient_clip=0.0))
    before = weights(engine)
    with engine.inference_model() as model:
        handle = model.backbone.layers[2].register_forward_pre_hook(
            lambda module, inputs: inputs[0].register_hook(lambda gradient: gradient * float("inf")) and None
        )
    result = engine.train_step([make_batch(2, 1)], CrossEntropy(), 1e-2)
    handle.remove()
    assert result.skipped and result.loss < 100
    for name, tensor in weights(engine).items():
        below = name.startswith(("backbone.embeddings", "backbone.layers.0.", "backbone.layers.1."))
        assert torch.isfinite(tensor).all(), name
        assert tensor.equal(before[name]) == below, name
    assert not engine.train_step([make_batch(2, 2)], CrossEntropy(), 1e-2).skipped


def test_an_engine_with_the_optimizer_in_backward_can_be_collected():
    engine = build_engine(FP32, wide_model(), training(in_backward=True, gradient_clip=0.0))
    with engine.inference_model() as model:
        parameter = weakref.ref(model.lm_head.weight)
    del engine, model
    gc.collect()
    assert parameter() is None


@pytest.mark.parametrize("kinds", [{"mamba"}, {"mlp"}, {"attention"}, {"mamba", "mlp", "attention"}])
def test_checkpointed_layers_give_the_same_gradients_bit_for_bit(tiny_training_model, make_batch, kinds):
    chosen = ActivationCheckpointingConfig(**dict.fromkeys(kinds, True))
    plain = build_engine(FP32, copy.deepcopy(tiny_training_model), training())
    again = build_engine(replace(FP32, activation_checkpointing=chosen), tiny_training_model, training())
    runs = []
    for layer, kind in zip(tiny_training_model.backbone.layers, TINY.hybrid_layer_pattern, strict=True):
        layer.register_forward_pre_hook(lambda module, inputs, kind=kind: runs.append(kind))
    for step in range(2):
        a, b = (e.train_step([make_batch(2, step)], CrossEntropy(), 1e-2) for e in (plain, again))
        assert (a.loss, a.grad_norm) == (b.loss, b.grad_norm)
    letters = chosen.layer_kinds()
    pattern = TINY.hybrid_layer_pattern
    assert len(runs) == 2 * (len(pattern) + sum(kind in letters for kind in pattern))
    assert_same_weights(plain, again)


def test_a_model_on_the_meta_device_gets_the_same_weights():
    with torch.device("meta"):
        late = HybridModel(WIDE)
    low = training(state_dtype=StateDtype.int8, parameter_dtype=ParameterDtype.bf16)
    engine, early = build_engine(BF16, late, low), build_engine(BF16, wide_model(), low)
    engine.init_weights(0)
    assert_same_weights(engine, early)


def test_bf16_weights_under_fp32_products_are_refused():
    with pytest.raises(UserError, match=r"parameter_dtype.*engine\.precision"):
        build_engine(FP32, wide_model(), training(parameter_dtype=ParameterDtype.bf16))


def test_accumulation_is_refused_by_name():
    with pytest.raises(UserError, match=r"in_backward.*global_batch_size"):
        build_engine(FP32, wide_model(), training(rows=4, in_backward=True, gradient_clip=0.0))


def test_out_of_memory_becomes_a_sentence_with_an_option_that_fits():
    training_config = training()
    with (
        pytest.raises(UserError, match="ran out of memory"),
        OutOfMemoryAdvice(FP32, WIDE, training_config, torch.device("cpu")),
    ):
        raise torch.OutOfMemoryError("CUDA out of memory")
    with pytest.raises(ZeroDivisionError), OutOfMemoryAdvice(FP32, WIDE, training_config, torch.device("cpu")):
        raise ZeroDivisionError
    big = replace(WIDE, vocab_size=131072, hidden_size=5120, intermediate_size=20480, hybrid_layer_pattern="M-" * 10)
    sentence = advice(BF16, big, training_config, "a GPU", 24 * 2**30)
    assert "24 GiB" in sentence and "state_dtype=int8" in sentence and "parameter_dtype=bf16" in sentence
    assert "smaller model" in advice(BF16, big, training_config, "a GPU", 2**30)
    assert "weights alone" in advice(BF16, big, None, "a GPU", 2**30)
