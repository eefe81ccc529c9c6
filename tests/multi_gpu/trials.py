"""What is measured: a model, its batch and its engine, with what the plan says about it, at the largest depth that fits."""

from collections.abc import Callable
from dataclasses import dataclass, replace

from nanotrain.config.engine import ActivationCheckpointingConfig, Device, EngineConfig, EngineKind, Precision
from nanotrain.config.errors import UserError
from nanotrain.config.megatron import MegatronConfig
from nanotrain.config.model import ATTENTION, ModelConfig
from nanotrain.config.parallel import DataParallel
from nanotrain.config.training import TrainingConfig
from nanotrain.engines.out_of_memory import USABLE_SHARE
from nanotrain.planning.flops import training_flops_per_token
from nanotrain.planning.fsdp2_memory import fsdp2_memory
from nanotrain.planning.layout import check_layout, data_parallel_size
from nanotrain.planning.parallel_memory import RankMemory, memory_per_stage
from nanotrain.planning.step_time import H100, H200, Card, StepTime, step_time
from nanotrain.planning.training_memory import training_memory
from tests.published import published_model

GIB = 2**30
PEAK_OPERATIONS = 989.4e12
"""Of a Hopper GPU a second, dense bf16 (the vendor's datasheet): what MFU divides by, in FP8 too."""
LEARNING_RATE = 1e-4
EVERYTHING = ActivationCheckpointingConfig(mamba=True, mlp=True, attention=True)
TINY = ModelConfig(
    hybrid_layer_pattern="M-M*-M-M*-",
    vocab_size=128,
    hidden_size=32,
    intermediate_size=64,
    num_attention_heads=8,
    num_key_value_heads=8,
    head_dim=8,
    mamba_num_heads=16,
    mamba_head_dim=8,
    ssm_state_size=16,
    n_groups=8,
    chunk_size=16,
)
TINY_STUDENT = replace(TINY, hybrid_layer_pattern="M-M*-M*-", hidden_size=24, intermediate_size=48)


@dataclass(frozen=True)
class Trial:
    """One configuration on so many ranks."""

    model: ModelConfig
    training: TrainingConfig
    engine: EngineConfig
    ranks: int

    @property
    def tokens_per_rank(self) -> float:
        """Tokens a step over all GPUs."""
        return self.training.tokens_per_step / self.ranks

    @property
    def micro_batches(self) -> int:
        """Of a data-parallel rank in a step."""
        megatron = self.engine.megatron if self.engine.kind is EngineKind.megatron else MegatronConfig()
        return self.training.global_batch_size // data_parallel_size(megatron, self.ranks)

    def rank_memory(self) -> RankMemory:
        """Return the plan of a Megatron rank (one pipeline stage), after its check of the layout."""
        layout = check_layout(self.model, self.training, self.engine, self.ranks)
        (stage,) = memory_per_stage(self.model, self.training, self.engine, layout)
        return stage

    def planned_bytes(self) -> int:
        """Return the plan's peak of a rank."""
        if self.engine.kind is EngineKind.megatron:
            return self.rank_memory().total
        if self.engine.data_parallel is DataParallel.fsdp2:
            return fsdp2_memory(self.model, self.training, self.engine, self.ranks).peak
        return training_memory(self.model, self.training, self.engine).peak

    def planned_time(self, card: Card) -> StepTime | None:
        """Return the plan's seconds of a step."""
        return step_time(self.model, self.training, self.engine, self.ranks, card)

    def rates(self, seconds: float) -> dict[str, float]:
        """Return tokens a second and model FLOPs of a GPU for a step of so many seconds; nothing recomputed counts."""
        tokens = self.tokens_per_rank / seconds
        operations = tokens * training_flops_per_token(self.model, self.training.sequence_length)
        return {
            "tokens_per_second_per_gpu": tokens,
            "tflops_per_gpu": operations / 1e12,
            "mfu": operations / PEAK_OPERATIONS,
        }


def card_of(name: str) -> Card:
    """Return what the plan knows of a GPU by torch's name for it; an H100 in a rehearsal."""
    return H200 if "H200" in name else H100


def architecture(size: str, *, cpu: bool) -> ModelConfig:
    """Return the published model, or its tiny counterpart."""
    return (TINY if size == "12b" else TINY_STUDENT) if cpu else published_model(size)


def training_of(batch: int, length: int) -> TrainingConfig:
    """Return a budget of `batch` sequences a step in micro-batches of one."""
    return TrainingConfig(
        steps=10, global_batch_size=batch, micro_batch_size=1, sequence_length=length, learning_rate=LEARNING_RATE
    )


def megatron_engine(device: Device, layout: MegatronConfig) -> EngineConfig:
    """Return Megatron's settings in the published precision; fp32 on CPU ranks, which have no FP8."""
    precision = Precision.fp32 if device is Device.cpu else Precision.fp8_blockwise
    return EngineConfig(kind=EngineKind.megatron, device=device, precision=precision, megatron=layout)


def torch_engine(device: Device, *, divided: bool, checkpointed: bool = False) -> EngineConfig:
    """Return the torch engine's settings in the published precision; fp32 on CPU ranks."""
    return EngineConfig(
        device=device,
        precision=Precision.fp32 if device is Device.cpu else Precision.fp8_blockwise,
        data_parallel=DataParallel.fsdp2 if divided else DataParallel.auto,
        activation_checkpointing=EVERYTHING if checkpointed else ActivationCheckpointingConfig(),
    )


def deepest(trial: Trial, free_bytes: int, needed: Callable[[Trial], float] = Trial.planned_bytes) -> Trial:
    """Return the trial with as many of its model's first layers as fit by the plan.

    Args:
        trial: at full depth.
        free_bytes: of the fullest GPU.
        needed: bytes of a trial.

    Raises:
        UserError: not even a stack with one layer of each kind fits, or the layout cannot be built.
    """
    pattern = trial.model.hybrid_layer_pattern
    least = pattern.index(ATTENTION) + 1
    for depth in range(len(pattern), least - 1, -1):
        tried = replace(trial, model=replace(trial.model, hybrid_layer_pattern=pattern[:depth]))
        if needed(tried) <= USABLE_SHARE * free_bytes:
            return tried
    raise UserError(
        f"the plan asks for {needed(tried) / GIB:.1f} GiB with {least} layers and the fullest GPU has"
        f" {free_bytes / GIB:.1f} GiB free; use more ranks."
    )


def described(trial: Trial, full: ModelConfig) -> dict[str, object]:
    """Return what a row says about a trial before it ran."""
    megatron = trial.engine.megatron
    return {
        "engine": trial.engine.kind.value,
        "precision": trial.engine.precision.value,
        "tensor": megatron.tensor_parallel,
        "context": megatron.context_parallel,
        "layers": trial.model.num_hidden_layers,
        "full_layers": full.num_hidden_layers,
        "sequence_length": trial.training.sequence_length,
        "micro_batches": trial.micro_batches,
    }


def against_plan(measured: float, planned: float | None, name: str) -> dict[str, float | None]:
    """Return a planned number and its relative error; no error where nothing was measured (memory of CPU ranks)."""
    error = planned / measured - 1 if planned is not None and measured > 0 else None
    return {f"plan_{name}": planned, f"plan_{name}_error": error}
