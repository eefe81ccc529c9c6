"""The whole engine on a GPU: fast kernels and every precision against plain torch in fp32."""

import copy
from dataclasses import replace

import pytest
import torch

from nanotrain.config.engine import Device, EngineConfig, KernelsConfig, Precision
from nanotrain.config.errors import UserError
from nanotrain.config.model import ModelConfig
from nanotrain.config.training import OptimizerConfig, ParameterDtype, StateDtype, TrainingConfig
from nanotrain.engines import build_engine
from nanotrain.engines.rehearsal import rehearse
from nanotrain.losses.language_modeling import CrossEntropy
from nanotrain.model.hybrid import HybridModel
from tests.conftest import random_batch

NARROW_12B = ModelConfig(
    hybrid_layer_pattern="M-M*-M-",
    vocab_size=512,
    hidden_size=256,
    intermediate_size=512,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=64,
    mamba_num_heads=128,
    mamba_head_dim=80,
    ssm_state_size=128,
    n_groups=8,
    initializer_range=0.05,
)
"""The published 12B's scan shapes, for which the kernels are tuned, in narrow layers."""

PLAIN = KernelsConfig(**{op: type(getattr(KernelsConfig(), op))("torch") for op in KernelsConfig().choices()})
TRAINING = TrainingConfig(steps=6, global_batch_size=4, micro_batch_size=2, sequence_length=256, learning_rate=1e-3)


def losses(model: HybridModel, precision: Precision, kernels: KernelsConfig | None = None, steps: int = 6):
    config = EngineConfig(device=Device.cuda, precision=precision, kernels=kernels or KernelsConfig())
    try:
        engine = build_engine(config, model, TRAINING)
    except UserError as error:
        pytest.skip(str(error))
    batches = [[random_batch(2, 2 * s + m, 256, 512) for m in range(2)] for s in range(steps)]
    results = [engine.train_step(batch, CrossEntropy(), 1e-3) for batch in batches]
    assert not any(result.skipped for result in results)
    return engine, [result.loss for result in results], [result.grad_norm for result in results]


@pytest.fixture(scope="module")
def initial() -> HybridModel:
    model = HybridModel(NARROW_12B)
    model.init_weights(0)
    return model


@pytest.fixture(scope="module")
def reference(initial):
    return losses(copy.deepcopy(initial), Precision.fp32, PLAIN)


@pytest.mark.parametrize(
    ("precision", "tolerance"),
    [(Precision.fp32, 1e-3), (Precision.bf16, 4e-3), (Precision.fp8_blockwise, 1e-2), (Precision.fp8_current, 1e-2)],
)
def test_training_follows_plain_torch_in_fp32(initial, reference, precision, tolerance):
    model = copy.deepcopy(initial)
    _, got, norms = losses(model, precision)
    assert got == pytest.approx(reference[1], rel=tolerance)
    assert norms == pytest.approx(reference[2], rel=30 * tolerance)
    assert model.state_dict().keys() == initial.state_dict().keys()
    assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_weights_move_between_precisions_unchanged(initial, tmp_path):
    """Train in FP8, save, load into a bf16 engine: the same tensors, bit for bit."""
    engine, _, _ = losses(copy.deepcopy(initial), Precision.fp8_blockwise, steps=2)
    engine.save_hf(tmp_path / "hf")
    other = build_engine(EngineConfig(device=Device.cuda, precision=Precision.bf16), copy.deepcopy(initial), TRAINING)
    other.load_hf(tmp_path / "hf")
    mine, theirs = engine._model.state_dict(), other._model.state_dict()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in mine.items())


def test_a_training_step_in_bf16_parameters(initial):
    """Parameters in bf16 train in every precision without a cast of the weights."""
    for precision in (Precision.bf16, Precision.fp8_blockwise):
        model = copy.deepcopy(initial).to(torch.bfloat16)
        _, got, _ = losses(model, precision, steps=2)
        assert got[0] == pytest.approx(6.24, abs=1.0)


def test_a_rehearsal_compiles_the_step_and_changes_nothing(initial):
    """After it, the first step meets no kernel of Triton's that is not compiled yet."""
    triton = pytest.importorskip("triton")
    config = EngineConfig(device=Device.cuda, precision=Precision.bf16)
    low = OptimizerConfig(state_dtype=StateDtype.int8, parameter_dtype=ParameterDtype.bf16)
    engine = build_engine(config, copy.deepcopy(initial), replace(TRAINING, optimizer=low))
    batch = random_batch(2, 0, 256, 512)
    before = copy.deepcopy((engine._model.state_dict(), engine._optimizer.state_dict()))
    compiled = []
    with triton.knobs.compilation.scope():
        triton.knobs.compilation.listener = lambda **compilation: compiled.append(compilation["src"].name)
        rehearse(engine._model, batch.to(engine.device), CrossEntropy(), engine._optimizer, engine._autocast)
        first = len(compiled)
        after = (engine._model.state_dict(), engine._optimizer.state_dict())
        for mine, theirs in zip(
            torch.utils._pytree.tree_leaves(before), torch.utils._pytree.tree_leaves(after), strict=True
        ):
            assert torch.equal(mine, theirs) if isinstance(mine, torch.Tensor) else mine == theirs
        engine._rehearsed = True
        assert not engine.train_step([batch], CrossEntropy(), 1e-3).skipped
    assert first > 5 and compiled[first:] == []
