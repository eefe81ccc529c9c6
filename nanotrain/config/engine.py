"""Which engine runs the model, on what device, in what precision."""

from dataclasses import dataclass, field
from enum import Enum

from nanotrain.config.errors import UserError
from nanotrain.config.megatron import MegatronConfig
from nanotrain.config.model import ATTENTION, MAMBA, MLP
from nanotrain.config.parallel import DataParallel, DeepSpeedConfig, Fsdp2Config, check_parallel_keys


class EngineKind(str, Enum):
    torch = "torch"
    megatron = "megatron"
    deepspeed = "deepspeed"


class Device(str, Enum):
    auto = "auto"
    cpu = "cpu"
    cuda = "cuda"


class Precision(str, Enum):
    auto = "auto"
    fp32 = "fp32"
    bf16 = "bf16"
    fp8_blockwise = "fp8_blockwise"
    fp8_current = "fp8_current"


FP8_PRECISIONS = (Precision.fp8_blockwise, Precision.fp8_current)
PUBLISHED_BF16_LAYERS = 2
"""At either end: the first and last four linear layers, which are two layers each."""


class SsdKernel(str, Enum):
    auto = "auto"
    torch = "torch"
    mamba_ssm = "mamba_ssm"


class ConvKernel(str, Enum):
    auto = "auto"
    torch = "torch"
    causal_conv1d = "causal_conv1d"


class GatedNormKernel(str, Enum):
    auto = "auto"
    torch = "torch"
    triton = "triton"
    mamba_ssm = "mamba_ssm"


class AttentionKernel(str, Enum):
    auto = "auto"
    torch = "torch"
    cudnn = "cudnn"
    flash = "flash"


class FusedKernel(str, Enum):
    auto = "auto"
    torch = "torch"
    triton = "triton"


class CoreKernel(str, Enum):
    auto = "auto"
    torch = "torch"
    fused = "fused"


class Fp8Gemm(str, Enum):
    auto = "auto"
    te = "te"
    wgmma = "wgmma"
    deep_gemm = "deep_gemm"


@dataclass
class KernelsConfig:
    """One switch per op. auto = the fastest that is installed on a GPU, plain torch on the CPU."""

    mamba_core: CoreKernel = CoreKernel.auto
    """Convolution, scan, gate and norm of a Mamba-2 mixer as one op, out of causal-conv1d's, mamba-ssm's and our own kernels;
    torch = each by its own switch below. auto = fused where those three switches are auto or name the same kernels."""
    ssd: SsdKernel = SsdKernel.auto
    """State space scan of Mamba-2."""
    causal_conv1d: ConvKernel = ConvKernel.auto
    gated_rms_norm: GatedNormKernel = GatedNormKernel.auto
    rms_norm: FusedKernel = FusedKernel.auto
    attention: AttentionKernel = AttentionKernel.auto
    """Packed documents run through flash attention under both cudnn and flash."""
    squared_relu: FusedKernel = FusedKernel.auto
    cross_entropy: FusedKernel = FusedKernel.auto
    """Softmax and gradient of a chunk of logits."""
    kl_divergence: FusedKernel = FusedKernel.auto
    gradient_scaling: FusedKernel = FusedKernel.auto
    """The linear losses' gradients times the gradient that reaches them (1 / tokens), in one pass over bf16 values."""
    adamw: FusedKernel = FusedKernel.auto
    """The update of low-precision states or weights, or in the backward pass; fp32 AdamW is torch's own fused kernel."""

    fp8_gemm: Fp8Gemm = Fp8Gemm.auto
    """FP8 blockwise only: what multiplies. te = Transformer Engine (cuBLASLt); wgmma = our kernel for Hopper, compiled by
    CUDA's runtime compiler; deep_gemm = DeepGEMM for outputs and input gradients, which needs CUDA's compiler (nvcc), and our
    kernel for weights' gradients. All give the same bits where cuBLASLt does not split the sum. auto = the fastest that is
    installed: deep_gemm, wgmma on Hopper, te elsewhere."""

    def choices(self) -> dict[str, str]:
        """Return op -> wanted kernel; `fp8_gemm` is no op but belongs to the precision."""
        wanted = {op: kernel.value for op, kernel in self.__dict__.items() if op != "fp8_gemm"}
        parts = (wanted["ssd"], wanted["causal_conv1d"], wanted["gated_rms_norm"])
        fused = ("mamba_ssm", "causal_conv1d", "triton")
        if wanted["mamba_core"] == "auto" and any(
            part not in ("auto", name) for part, name in zip(parts, fused, strict=True)
        ):
            wanted["mamba_core"] = "torch"
        return wanted

    def validate(self, path: str, precision: Precision) -> None:
        if self.fp8_gemm is not Fp8Gemm.auto and precision is not Precision.fp8_blockwise:
            raise UserError(
                f"`{path}.fp8_gemm` ({self.fp8_gemm.value}) belongs to `precision` fp8_blockwise and would be ignored by"
                f" {precision.value}; remove it."
            )


@dataclass
class ActivationCheckpointingConfig:
    """Kinds of layers that keep only their input in the forward pass and run again in the backward pass."""

    mamba: bool = False
    mlp: bool = False
    attention: bool = False

    def layer_kinds(self) -> frozenset[str]:
        """Return the letters of the checkpointed layers in `hybrid_layer_pattern`."""
        chosen = {MAMBA: self.mamba, MLP: self.mlp, ATTENTION: self.attention}
        return frozenset(kind for kind, checkpointed in chosen.items() if checkpointed)


@dataclass
class EngineConfig:
    """The group `engine` (configs/engine/): file name = value."""

    kind: EngineKind = EngineKind.torch
    device: Device = Device.auto
    """auto = cuda when there is one, else cpu."""
    precision: Precision = Precision.auto
    """Matrix products in fp32, bf16 (autocast) or FP8; parameters have the same names and dtypes in all of them.
    auto = bf16 where the device has bf16 matrix instructions, else fp32. fp8_blockwise is the published run's: E4M3,
    weights in 128 x 128 blocks, activations and gradients in 1 x 128 tiles; fp8_current scales whole tensors, with E5M2
    gradients. In both, embedding, output head and the layers named below stay in bf16."""
    fp8_bf16_first_layers: int = PUBLISHED_BF16_LAYERS
    """FP8 only: so many layers at the start multiply in bf16 (published: the first four linears, which are two layers)."""
    fp8_bf16_last_layers: int = PUBLISHED_BF16_LAYERS
    """FP8 only: so many layers at the end multiply in bf16."""
    kernels: KernelsConfig = field(default_factory=KernelsConfig)
    activation_checkpointing: ActivationCheckpointingConfig = field(default_factory=ActivationCheckpointingConfig)
    """Trades time for memory; gradients stay the same bit for bit."""
    threads: int = 0
    """CPU threads of torch; 0 = torch's own choice."""
    megatron: MegatronConfig = field(default_factory=MegatronConfig)
    """kind=megatron only."""
    data_parallel: DataParallel = DataParallel.auto
    """kind=torch on several ranks: ddp = every rank holds the whole model, fsdp2 = weights, gradients and optimizer states
    are divided over the ranks. auto = ddp where there are several ranks."""
    fsdp2: Fsdp2Config = field(default_factory=Fsdp2Config)
    """data_parallel=fsdp2 only."""
    deepspeed: DeepSpeedConfig = field(default_factory=DeepSpeedConfig)
    """kind=deepspeed only."""

    def validate(self, path: str) -> None:
        if self.threads < 0:
            raise UserError(f"`{path}.threads` ({self.threads}) must not be negative; 0 leaves the choice to torch.")
        self.megatron.validate(f"{path}.megatron")
        if self.kind is not EngineKind.megatron and self.megatron != MegatronConfig():
            raise UserError(
                f"`{path}.megatron` belongs to `{path}.kind` (megatron) and would be ignored by {self.kind.value}; remove"
                " it, or choose engine=megatron."
            )
        check_parallel_keys(path, self.kind.value, self.data_parallel, self.fsdp2, self.deepspeed)
        self.kernels.validate(f"{path}.kernels", self.precision)
        for name in ("fp8_bf16_first_layers", "fp8_bf16_last_layers"):
            if self.__dict__[name] < 0:
                raise UserError(f"`{path}.{name}` ({self.__dict__[name]}) must not be negative; 0 = no layer.")
            if self.precision not in FP8_PRECISIONS and self.__dict__[name] != PUBLISHED_BF16_LAYERS:
                raise UserError(
                    f"`{path}.{name}` ({self.__dict__[name]}) belongs to FP8 and would be ignored by"
                    f" `{path}.precision` ({self.precision.value}); remove it, or set precision to fp8_blockwise or"
                    " fp8_current."
                )


class TrackerKind(str, Enum):
    none = "none"
    wandb = "wandb"
    trackio = "trackio"
    tensorboard = "tensorboard"


class TrackerMode(str, Enum):
    offline = "offline"
    online = "online"


@dataclass
class TrackingConfig:
    """The group `tracking` (configs/tracking/). metrics.jsonl is always written; a tracker comes on top."""

    kind: TrackerKind = TrackerKind.none
    project: str = "nanotrain"
    mode: TrackerMode = TrackerMode.offline
    """wandb only: offline needs no account and no network."""

    def validate(self, path: str) -> None:
        if self.mode is TrackerMode.online and self.kind is not TrackerKind.wandb:
            raise UserError(f"`{path}.mode` (online) is for kind=wandb; kind={self.kind.value} would ignore it.")
