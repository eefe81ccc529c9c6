"""Every setting that the Megatron engine has no counterpart of is refused by its key, and so is a machine without it."""

from dataclasses import replace

import pytest
import torch

from nanotrain.config.engine import (
    ActivationCheckpointingConfig,
    EngineConfig,
    EngineKind,
    FusedKernel,
    KernelsConfig,
    Precision,
    SsdKernel,
)
from nanotrain.config.errors import UserError
from nanotrain.config.megatron import MegatronConfig
from nanotrain.config.training import OptimizerConfig, ParameterDtype, StateDtype, TrainingConfig
from nanotrain.engines import build_engine, megatron_limits
from nanotrain.engines.megatron_limits import (
    choose_dtype,
    require_addressable,
    require_device,
    require_saveable,
    require_supported,
)
from nanotrain.model.hybrid import build_meta_model
from tests.engines.megatron_ranks import SMALL

ENGINE = EngineConfig(kind=EngineKind.megatron)
OPTIMIZER = OptimizerConfig()


@pytest.mark.parametrize(
    ("engine", "model", "optimizer", "key"),
    [
        (replace(ENGINE, kernels=KernelsConfig(ssd=SsdKernel.torch)), SMALL, OPTIMIZER, r"engine\.kernels\.ssd"),
        (
            replace(ENGINE, activation_checkpointing=ActivationCheckpointingConfig(mlp=True)),
            SMALL,
            OPTIMIZER,
            r"engine\.activation_checkpointing",
        ),
        (replace(ENGINE, precision=Precision.fp8_current), SMALL, OPTIMIZER, "fp8_current"),
        (
            replace(ENGINE, precision=Precision.fp8_blockwise, megatron=MegatronConfig(distributed_optimizer=False)),
            SMALL,
            OPTIMIZER,
            r"engine\.megatron\.fp8_parameters",
        ),
        (ENGINE, replace(SMALL, tie_word_embeddings=True), OPTIMIZER, "tie_word_embeddings"),
        (ENGINE, SMALL, replace(OPTIMIZER, state_dtype=StateDtype.int8), r"optimizer\.state_dtype"),
        (ENGINE, SMALL, replace(OPTIMIZER, parameter_dtype=ParameterDtype.bf16), r"optimizer\.parameter_dtype"),
        (ENGINE, SMALL, replace(OPTIMIZER, in_backward=True, gradient_clip=0.0), r"optimizer\.in_backward"),
    ],
)
def test_what_it_cannot_do_is_refused(engine, model, optimizer, key):
    with pytest.raises(UserError, match=key):
        require_supported(engine, model, optimizer)


def test_what_it_can_do_is_not():
    engine = replace(ENGINE, kernels=KernelsConfig(cross_entropy=FusedKernel.torch), precision=Precision.fp8_blockwise)
    require_supported(engine, SMALL, OPTIMIZER)
    require_supported(ENGINE, SMALL, None)


def test_an_optimizer_whose_state_could_not_be_saved_is_refused():
    whole = replace(ENGINE, megatron=MegatronConfig(distributed_optimizer=False))
    with pytest.raises(UserError, match=r"engine\.megatron\.distributed_optimizer.*set it to true"):
        require_saveable(whole, SMALL, torch.bfloat16)
    require_saveable(whole, SMALL, torch.float32)
    require_saveable(whole, replace(SMALL, hybrid_layer_pattern="-*-"), torch.bfloat16)
    require_saveable(ENGINE, SMALL, torch.bfloat16)


def test_megatron_that_is_not_installed_is_named(monkeypatch):
    monkeypatch.setattr(megatron_limits, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install megatron-core"):
        build_engine(ENGINE, build_meta_model(SMALL))


def test_sequences_that_mamba_ssm_cannot_index_are_refused(published):
    model, cuda = published("12b"), torch.device("cuda")

    def check(length: int, **sizes: int) -> None:
        training = TrainingConfig(
            steps=1, global_batch_size=1, micro_batch_size=1, sequence_length=length, learning_rate=1.0
        )
        require_addressable(replace(ENGINE, megatron=MegatronConfig(**sizes)), model, training, cuda)

    check(94_720)
    with pytest.raises(UserError, match=r"2,969,567,232 values .* over 2 or more ranks"):
        check(131_072)
    check(131_072, tensor_parallel=2)
    check(524_288, tensor_parallel=8, context_parallel=16)


def test_devices_and_precisions(monkeypatch):
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    with pytest.raises(UserError, match="needs a GPU"):
        require_device(cpu, {"cuda"})
    require_device(cpu, {"cuda", "cpu"})
    monkeypatch.setattr(megatron_limits, "find_spec", lambda name: None if name == "mamba_ssm" else object())
    with pytest.raises(UserError, match="mamba-ssm, which is not installed"):
        require_device(cuda, {"cuda"})
    with pytest.raises(UserError, match="fp32"):
        choose_dtype(Precision.fp32, cuda)
    with pytest.raises(UserError, match="fp8_blockwise"):
        choose_dtype(Precision.fp8_blockwise, cpu)
    assert choose_dtype(Precision.auto, cpu) is torch.float32
    assert choose_dtype(Precision.auto, cuda) is choose_dtype(Precision.bf16, cpu) is torch.bfloat16
