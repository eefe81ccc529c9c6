"""How long, how large and how fast a training stage runs."""

from dataclasses import dataclass, field
from enum import Enum

from omegaconf import MISSING

from nanotrain.config.errors import UserError


class ScheduleKind(str, Enum):
    constant = "constant"
    cosine = "cosine"
    wsd = "wsd"


class DecayShape(str, Enum):
    linear = "linear"
    cosine = "cosine"
    minus_sqrt = "minus_sqrt"


@dataclass
class ScheduleConfig:
    """Learning rate over optimizer steps: linear warm-up, then by kind. WSD = warm-up, stable, decay."""

    kind: ScheduleKind = ScheduleKind.wsd
    warmup_steps: int = 0
    decay_steps: int = 0
    """Length of WSD's final decay; cosine decays over everything after the warm-up and refuses this key."""
    decay_shape: DecayShape = DecayShape.minus_sqrt
    """Shape of WSD's decay. The published run does not state its own; minus_sqrt is a sibling recipe's."""
    min_learning_rate: float = 0.0

    def validate(self, path: str, steps: int, learning_rate: float) -> None:
        if self.min_learning_rate > learning_rate or self.min_learning_rate < 0:
            raise UserError(
                f"`{path}.min_learning_rate` ({self.min_learning_rate}) must lie between 0 and `learning_rate`"
                f" ({learning_rate})."
            )
        for name in ("warmup_steps", "decay_steps"):
            if self.__dict__[name] < 0:
                raise UserError(f"`{path}.{name}` ({self.__dict__[name]}) must not be negative.")
        if self.kind is not ScheduleKind.wsd and self.decay_steps:
            raise UserError(
                f"`{path}.decay_steps` ({self.decay_steps}) belongs to kind=wsd and would be ignored by"
                f" kind={self.kind.value}; remove it or set kind=wsd."
            )
        if self.warmup_steps + self.decay_steps > steps:
            raise UserError(
                f"`{path}.warmup_steps` ({self.warmup_steps}) + `decay_steps` ({self.decay_steps}) must not exceed"
                f" `steps` ({steps}); shorten them or raise `steps`."
            )


class OptimizerKind(str, Enum):
    adamw = "adamw"


class StateDtype(str, Enum):
    fp32 = "fp32"
    bf16 = "bf16"
    int8 = "int8"


class ParameterDtype(str, Enum):
    fp32 = "fp32"
    bf16 = "bf16"


class SaveFailure(str, Enum):
    warn = "warn"
    stop = "stop"


class SpikeAction(str, Enum):
    off = "off"
    log = "log"
    skip = "skip"
    roll_back = "roll_back"


@dataclass
class SpikeConfig:
    """What to do when a step's loss stands out from those before it."""

    action: SpikeAction = SpikeAction.off
    """log = say so; skip = leave the update out; roll_back = go back to the newest state of `keep_every` and go on with the
    step after the spike, so that its data and all since that state are left out."""
    z_score: float = 6.0
    """Standard deviations above the mean of the window."""
    window: int = 128
    """Steps that the mean and the standard deviation are taken over; nothing is a spike before it is half full."""

    def validate(self, path: str, training: "TrainingConfig") -> None:
        if not self.z_score > 0:
            raise UserError(f"`{path}.z_score` ({self.z_score}) must be greater than 0.")
        if self.window < 4:
            raise UserError(f"`{path}.window` ({self.window}) must be at least 4.")
        if self.action is SpikeAction.skip and training.optimizer.in_backward:
            raise UserError(
                f"`{path}.action` (skip) must know the loss before the update, but `stage.training.optimizer.in_backward`"
                " updates in the backward pass; set one of them otherwise."
            )
        if self.action is SpikeAction.roll_back and not training.keep_every:
            raise UserError(
                f"`{path}.action` (roll_back) goes back to states at fixed steps, so that a run resumed in between ends the"
                " same; set `stage.training.keep_every`."
            )


MAX_BETA_OF_BF16_STATES = 0.99
"""bf16 keeps 8 bits: an average that moves by less than 2^-9 of the difference a step would stand still."""


@dataclass
class OptimizerConfig:
    """AdamW with the published betas and weight decay; epsilon is Megatron's default (not published)."""

    kind: OptimizerKind = OptimizerKind.adamw
    beta1: float = 0.9
    beta2: float = 0.95
    epsilon: float = 1e-8
    weight_decay: float = 0.1
    """Not applied to 1-D parameters (norms, A_log, D, dt_bias, convolution bias)."""
    gradient_clip: float = 1.0
    """Global L2 norm; 0 switches clipping off."""
    state_dtype: StateDtype = StateDtype.fp32
    """Of both moments: 8, 4 or 2.03 bytes a parameter. int8 = blocks of 256 values with one scale (arXiv:2110.02861);
    tensors of less than 4,096 values keep fp32. The published run has fp32."""
    parameter_dtype: ParameterDtype = ParameterDtype.fp32
    """Of weights and gradients. bf16 = no fp32 master weights: updates are rounded stochastically, with noise keyed by
    tensor and step; A_log, D and dt_bias stay fp32. The published run has fp32 masters."""
    in_backward: bool = False
    """Update each tensor as soon as its gradient is ready, and free the gradient: no gradient is kept for a whole model.
    Neither clipping by the global norm nor accumulation over micro-batches is possible then."""

    def validate(self, path: str) -> None:
        for name in ("beta1", "beta2"):
            if not 0 <= self.__dict__[name] < 1:
                raise UserError(f"`{path}.{name}` ({self.__dict__[name]}) must lie in [0, 1).")
        for name in ("weight_decay", "gradient_clip"):
            if self.__dict__[name] < 0:
                raise UserError(f"`{path}.{name}` ({self.__dict__[name]}) must not be negative.")
        if self.epsilon <= 0:
            raise UserError(f"`{path}.epsilon` ({self.epsilon}) must be greater than 0.")
        if self.in_backward and self.gradient_clip > 0:
            raise UserError(
                f"`{path}.in_backward` updates weights before the global norm is known, so it cannot clip by it; set"
                f" `{path}.gradient_clip` ({self.gradient_clip}) to 0 or `in_backward` to false."
            )
        beta = max(self.beta1, self.beta2)
        if self.state_dtype is StateDtype.bf16 and beta > MAX_BETA_OF_BF16_STATES:
            raise UserError(
                f"`{path}.state_dtype` (bf16) cannot hold averages with a beta of {beta}: its 8 bits lose steps that small;"
                f" use fp32 or int8, or betas of at most {MAX_BETA_OF_BF16_STATES}."
            )


@dataclass
class TrainingConfig:
    """One training stage's budget. Batch sizes count sequences; steps are optimizer steps."""

    steps: int = MISSING
    global_batch_size: int = MISSING
    """Sequences per optimizer step over all data-parallel ranks."""
    micro_batch_size: int = MISSING
    """Sequences per rank per forward pass."""
    sequence_length: int = MISSING
    """Tokens per sequence."""
    learning_rate: float = MISSING
    """Peak."""
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    evaluation_interval: int = 0
    """Held-out loss every so many steps; 0 = only after the last step."""
    evaluation_tokens: int = 0
    """Held-out tokens scored per category, spread evenly over its text; 0 = all."""
    save_interval_seconds: float = 600.0
    """A resumable state is saved when so much time has passed since the last one."""
    keep_last: int = 2
    """Number of newest resumable states kept."""
    keep_every: int = 0
    """Every so many steps a state is saved and kept for good; 0 = none."""
    on_save_failure: SaveFailure = SaveFailure.warn
    """When a state cannot be stored (disk full, read-only): warn = go on and try again at the next one; stop = end the run.
    The states before it are intact either way."""
    watchdog_seconds: float = 1800.0
    """A process that finishes no step and no held-out evaluation for so long prints the stacks of all its threads and
    ends, so that the launcher starts it again; 0 = never."""
    log_interval: int = 1
    """Steps between lines of metrics.jsonl."""
    max_nonfinite_steps: int = 5
    """A step with a non-finite loss or gradient is skipped and counted; so many in a row end the run."""
    spike: SpikeConfig = field(default_factory=SpikeConfig)

    @property
    def tokens_per_step(self) -> int:
        return self.global_batch_size * self.sequence_length

    def validate(self, path: str) -> None:
        """Raise UserError when a value is out of range or batch sizes do not divide."""
        minimum = {"steps": 1, "global_batch_size": 1, "micro_batch_size": 1, "sequence_length": 2, "keep_last": 1}
        minimum |= {"evaluation_interval": 0, "evaluation_tokens": 0, "log_interval": 1, "max_nonfinite_steps": 1}
        minimum |= {"keep_every": 0, "watchdog_seconds": 0}
        for name, least in minimum.items():
            if self.__dict__[name] < least:
                raise UserError(f"`{path}.{name}` ({self.__dict__[name]}) must be at least {least}.")
        if not self.learning_rate > 0:
            raise UserError(f"`{path}.learning_rate` ({self.learning_rate}) must be greater than 0.")
        if not self.save_interval_seconds > 0:
            raise UserError(f"`{path}.save_interval_seconds` ({self.save_interval_seconds}) must be greater than 0.")
        self.schedule.validate(f"{path}.schedule", self.steps, self.learning_rate)
        self.optimizer.validate(f"{path}.optimizer")
        self.spike.validate(f"{path}.spike", self)

    def validate_batch(self, path: str, dp_size: int) -> None:
        """Raise UserError unless the global batch splits evenly over ranks and micro-batches."""
        unit = self.micro_batch_size * dp_size
        if self.global_batch_size % unit:
            ranks = f" x {dp_size} data-parallel ranks" if dp_size > 1 else ""
            ways = [
                f"set `{path}.global_batch_size` to {self.nearest_batch_sizes(unit)}",
                *self._nearest_ranks(dp_size),
            ]
            raise UserError(
                f"`{path}.global_batch_size` ({self.global_batch_size}) must be divisible by `micro_batch_size`"
                f" ({self.micro_batch_size}){ranks}; {', or '.join(ways)}."
            )
        if self.optimizer.in_backward and self.global_batch_size > unit:
            raise UserError(
                f"`{path}.optimizer.in_backward` updates weights in every backward pass, so it cannot accumulate:"
                f" `{path}.global_batch_size` ({self.global_batch_size}) must equal `micro_batch_size`"
                f" ({self.micro_batch_size}) x {dp_size} data-parallel ranks; set it to {unit} or `in_backward` to false."
            )

    def nearest_batch_sizes(self, unit: int) -> str:
        """Return the multiples of `unit` on either side of the global batch, as text."""
        below = self.global_batch_size // unit * unit
        return f"{below} or {below + unit}" if below else f"{unit}"

    def _nearest_ranks(self, dp_size: int) -> list[str]:
        """Return the numbers of data-parallel ranks on either side that split the batch as it is, as text."""
        micro_batches, rest = divmod(self.global_batch_size, self.micro_batch_size)
        if dp_size == 1 or rest:
            return []
        work = [size for size in range(1, micro_batches + 1) if micro_batches % size == 0]
        sides = [max(size for size in work if size < dp_size), *sorted(size for size in work if size > dp_size)[:1]]
        return [f"use {' or '.join(str(size) for size in sides)} data-parallel ranks"]
