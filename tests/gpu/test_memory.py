"""What saves memory on a GPU: the AdamW kernel, the chunked losses, the optimizer in the backward pass, and running out."""

import copy
import gc
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from nanotrain.config.engine import (
    ActivationCheckpointingConfig,
    AttentionKernel,
    ConvKernel,
    EngineConfig,
    GatedNormKernel,
    KernelsConfig,
    Precision,
    SsdKernel,
)
from nanotrain.config.errors import UserError
from nanotrain.config.training import OptimizerConfig, ParameterDtype, StateDtype, TrainingConfig
from nanotrain.engines import build_engine
from nanotrain.losses.language_modeling import CrossEntropy
from nanotrain.model.hybrid import HybridModel
from nanotrain.ops.adamw import adamw_update, adamw_update_ref
from nanotrain.ops.backends import choose_kernels
from nanotrain.ops.gradient_scaling import scale_gradients
from nanotrain.ops.kl_divergence import linear_kl_divergence
from nanotrain.ops.linear_cross_entropy import linear_cross_entropy
from nanotrain.ops.moments import AdamWStep, new_moments
from tests.conftest import TINY, random_batch

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


@pytest.fixture(autouse=True)
def kernels():
    pytest.importorskip("triton")
    choose_kernels(
        dict.fromkeys(("cross_entropy", "kl_divergence", "gradient_scaling", "adamw"), "triton"), torch.device("cuda")
    )


@pytest.mark.parametrize("states", [torch.float32, torch.bfloat16, torch.uint8])
@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(300, 512), (7, 13)])
def test_adamw_kernel_equals_its_twin(weights, states, shape):
    generator = torch.Generator("cuda").manual_seed(0)

    def draw(std):
        return torch.empty(shape, device="cuda").normal_(0, std, generator=generator)

    ours = draw(0.02).to(weights)
    twin = ours.clone()
    moments = new_moments(ours, states), new_moments(twin, states)
    for step in (1, 2, 3):
        gradient = (draw(1e-3) * draw(1.0) ** 4).to(weights)
        numbers = AdamWStep(1e-3, 0.9, 0.95, 1e-8, 0.1, step, (step, 77))
        adamw_update(ours, gradient, moments[0], numbers, torch.ones((), dtype=torch.bool, device="cuda"))
        adamw_update_ref(twin, gradient, moments[1], numbers)
    # Products rounded in another order may end in a neighbouring code or bf16 value, of a few elements.
    unequal = (ours.float() - twin.float()).abs() > 1e-6
    share = 2e-3 if weights is torch.bfloat16 or states is torch.bfloat16 else 1e-4
    assert unequal.sum() <= max(1, share * ours.numel())
    assert (ours.float() - twin.float()).abs().max() < 1e-3
    before = ours.clone()
    adamw_update(ours, gradient, moments[0], numbers, torch.zeros((), dtype=torch.bool, device="cuda"))
    assert ours.equal(before)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 8e-3)])
@pytest.mark.parametrize("loss", ["cross_entropy", "kl"])
def test_chunked_losses_equal_full_logits(loss, dtype, tolerance):
    torch.manual_seed(0)
    hidden, weight, teacher, teacher_weight = (
        (torch.randn(n, 192, device="cuda") * s).to(dtype).requires_grad_() for n, s in ((700, 1), (5001, 0.1)) * 2
    )
    labels = torch.randint(0, 5001, (700,), device="cuda")
    labels[::7] = -100
    wide = [t.detach().double().requires_grad_() for t in (hidden, weight)]
    logits = wide[0] @ wide[1].T
    if loss == "kl":
        got = linear_kl_divergence(
            hidden, weight, teacher, teacher_weight, labels != -100, temperature=1.5, chunk_tokens=256
        )
        target = (teacher.double() @ teacher_weight.double().T / 1.5).log_softmax(-1).detach()
        divergence = F.kl_div((logits / 1.5).log_softmax(-1), target, log_target=True, reduction="none").sum(-1)
        want = 1.5**2 * (divergence * (labels != -100)).sum()
    else:
        got = linear_cross_entropy(hidden, weight, labels, chunk_tokens=256)
        want = F.cross_entropy(logits, labels, reduction="sum")
    assert float(got.detach()) == pytest.approx(float(want.detach()), rel=tolerance)
    gradients = torch.autograd.grad(got, (hidden, weight)), torch.autograd.grad(want, wide)
    for ours, exact in zip(*gradients, strict=True):
        assert (ours.double() - exact).norm() < tolerance * exact.norm()


@pytest.mark.parametrize("shape", [(5001, 192), (3, 7)])
def test_narrow_gradients_are_scaled_in_place_and_rounded_once(shape):
    values, factor = torch.randn(shape, device="cuda").bfloat16(), torch.tensor(1 / 7789, device="cuda")
    scaled = values.clone()
    assert scale_gradients([scaled], factor) == [scaled]
    assert scaled.equal((values.float() * factor).bfloat16()) and not scaled.equal(values * factor.bfloat16())


PLAIN = KernelsConfig(
    ssd=SsdKernel.torch, causal_conv1d=ConvKernel.torch, gated_rms_norm=GatedNormKernel.torch,
    attention=AttentionKernel.torch,
)  # fmt: skip
"""Without kernels that would be tuned for the tiny shapes first."""
BF16 = EngineConfig(precision=Precision.bf16, kernels=PLAIN)


def training(**optimizer) -> TrainingConfig:
    return TrainingConfig(
        steps=9, global_batch_size=2, micro_batch_size=2, sequence_length=12, learning_rate=1e-3,
        optimizer=OptimizerConfig(gradient_clip=0.0, **optimizer),
    )  # fmt: skip


def engine_of(model, config=None, **optimizer):
    return build_engine(config or BF16, copy.deepcopy(model), training(**optimizer))


@pytest.mark.parametrize("states", list(StateDtype))
def test_optimizer_in_backward_equals_the_step_after_it(tiny_training_model, states):
    low = {"parameter_dtype": ParameterDtype.bf16, "state_dtype": states}
    after, within = engine_of(tiny_training_model, **low), engine_of(tiny_training_model, in_backward=True, **low)
    for step in range(3):
        a, b = (e.train_step([random_batch(2, step)], CrossEntropy(), 1e-3) for e in (after, within))
        assert a.loss == b.loss and a.grad_norm == pytest.approx(b.grad_norm, rel=1e-5)
    with after.inference_model() as one, within.inference_model() as other:
        for (name, p), q in zip(one.named_parameters(), other.parameters(), strict=True):
            assert p.equal(q), name


def test_checkpointed_layers_give_the_same_loss_and_norm(tiny_training_model):
    everything = ActivationCheckpointingConfig(mamba=True, mlp=True, attention=True)
    plain = engine_of(tiny_training_model)
    again = engine_of(tiny_training_model, replace(BF16, activation_checkpointing=everything))
    for step in range(3):
        a, b = (e.train_step([random_batch(2, step)], CrossEntropy(), 1e-3) for e in (plain, again))
        assert a.loss == pytest.approx(b.loss, rel=1e-5) and a.grad_norm == pytest.approx(b.grad_norm, rel=1e-3)


def test_an_engine_with_the_optimizer_in_backward_frees_its_memory(tiny_training_model):
    left = []
    for _ in range(2):  # after the first one cuBLAS keeps its workspaces
        engine = engine_of(tiny_training_model, in_backward=True)
        engine.train_step([random_batch(2, 0)], CrossEntropy(), 1e-3)
        during = torch.cuda.memory_allocated()
        del engine
        gc.collect()
        left.append(torch.cuda.memory_allocated())
    assert during > left[0]
    assert left[1] <= left[0] + 2**16


def test_out_of_memory_names_an_option():
    gc.collect()
    torch.cuda.empty_cache()
    with torch.device("meta"):
        model = HybridModel(replace(TINY, vocab_size=400_000, hidden_size=1024))
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + 2**30) / total)
    try:
        with pytest.raises(UserError, match=r"ran out of memory .* needs about .*GiB"):
            build_engine(BF16, model, training())
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
