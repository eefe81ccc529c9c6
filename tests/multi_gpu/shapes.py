"""What the checks on several ranks train: the 12B's heads in narrow layers on GPUs, the same layers tiny on CPU ranks.

Nothing here imports PyTorch: the process that starts the ranks is up at once.
"""

from dataclasses import dataclass, replace

from nanotrain.config.engine import Device, EngineConfig, Precision
from nanotrain.config.model import ModelConfig
from nanotrain.config.training import TrainingConfig

CPU_PATIENCE = 10.0
SEED, LEARNING_RATE = 1, 2e-4
TOLERANCE = {
    Precision.fp32: ((1e-5, 1e-4), (1e-5, 1e-4)),
    Precision.bf16: ((2e-4, 5e-3), (2e-3, 2e-2)),
    Precision.fp8_blockwise: ((1e-3, 1e-2), (5e-3, 5e-2)),
}
"""Relative, of (loss, gradient norm) in the first step and in all. Ranks add up in another order, Megatron's residual stream
is bf16 and the torch engine's fp32; on two H200 the engines differed by 1e-5 in the first bf16 step and 4e-5 in five, FP8 by 3e-5 and 2e-4."""


@dataclass(frozen=True)
class Shape:
    """A model and its batches; always eight micro-batches a step, so that up to eight ranks share them.

    Attributes:
        model: the architecture.
        length: tokens a row.
        rows: of a micro-batch.
        device: of the engines.
        precisions: in which engines are compared, the first one by all of them.
        threads: that draw the initial weights.
    """

    model: ModelConfig
    length: int
    rows: int
    device: Device
    precisions: tuple[Precision, ...]
    threads: int

    MICRO_BATCHES = 8

    def training(self, **changes: object) -> TrainingConfig:
        return replace(
            TrainingConfig(
                steps=8,
                global_batch_size=self.MICRO_BATCHES * self.rows,
                micro_batch_size=self.rows,
                sequence_length=self.length,
                learning_rate=LEARNING_RATE,
            ),
            **changes,
        )

    def engine(self, precision: Precision, **changes: object) -> EngineConfig:
        """Return the settings of an engine; under FP8 one layer at either end stays in bf16."""
        config = EngineConfig(device=self.device, precision=precision, threads=self.threads)
        if precision is Precision.fp8_blockwise:
            config = replace(config, fp8_bf16_first_layers=1, fp8_bf16_last_layers=1)
        return replace(config, **changes)


# Six layers: FP8 runs in one of each kind and in a second MLP, and four pipeline stages have one or two. Tensor
# parallelism up to 8 leaves a rank one group of keys and of Mamba-2, and every FP8 matrix a multiple of 16.
GPU = Shape(
    ModelConfig(
        hybrid_layer_pattern="M-*M-M",
        vocab_size=8192,
        hidden_size=1024,
        intermediate_size=4096,
        num_attention_heads=16,
        num_key_value_heads=8,
        head_dim=128,
        mamba_num_heads=128,
        mamba_head_dim=80,
        ssm_state_size=128,
        n_groups=8,
    ),
    length=1024,
    rows=2,
    device=Device.cuda,
    precisions=(Precision.bf16, Precision.fp8_blockwise),
    threads=8,
)
CPU = Shape(
    ModelConfig(
        hybrid_layer_pattern="M-*M-M",
        vocab_size=67,
        hidden_size=32,
        intermediate_size=48,
        num_attention_heads=16,
        num_key_value_heads=8,
        head_dim=4,
        mamba_num_heads=16,
        mamba_head_dim=4,
        ssm_state_size=8,
        n_groups=8,
        chunk_size=16,
        initializer_range=0.1,
    ),
    length=64,
    rows=1,
    device=Device.cpu,
    precisions=(Precision.fp32,),
    threads=1,
)


def patience(*, cpu: bool) -> float:
    """Return the factor of all limits of time: CPU ranks share their cores with whatever else runs."""
    return CPU_PATIENCE if cpu else 1.0
