"""One dataclass a stage. The class of `stage` in a recipe (chosen by the group `stage`) selects the stage function."""

from dataclasses import dataclass, field
from enum import Enum

from omegaconf import MISSING

from nanotrain.config.data import (
    CATEGORIES,
    CorpusConfig,
    PhaseConfig,
    ReasoningConfig,
    names_a_folder,
    validate_curriculum,
)
from nanotrain.config.errors import UserError
from nanotrain.config.model import ModelConfig
from nanotrain.config.training import TrainingConfig

PREVIOUS = "previous"
"""Value of `*_from` keys that means: the nearest earlier entry that leaves the right kind of product."""


@dataclass
class StageConfig:
    """What all stages share: nothing. `*_from` keys take an entry's name, a folder, or `previous`."""

    def validate(self, path: str) -> None:
        """Raise UserError when values do not fit together."""


@dataclass
class PrepareConfig(StageConfig):
    """Fetch text, split it by document family, build the tokenizer, write token shards and chat rows."""

    corpus: CorpusConfig = field(default_factory=CorpusConfig)

    def validate(self, path: str) -> None:
        self.corpus.validate(f"{path}.corpus")


@dataclass
class PretrainConfig(StageConfig):
    """Next-token training from random weights, over a curriculum of blends."""

    data_from: str = PREVIOUS
    model: ModelConfig = field(default_factory=ModelConfig)
    architecture_from: str = ""
    """Take the architecture of this checkpoint (fresh weights) instead of `model`: from-scratch baselines."""
    curriculum: list[PhaseConfig] = field(default_factory=list)
    training: TrainingConfig = field(default_factory=TrainingConfig)

    def validate(self, path: str) -> None:
        if not self.architecture_from:
            self.model.validate(f"{path}.model")
        sources = None if names_a_folder(self.data_from) else CATEGORIES
        validate_curriculum(self.curriculum, f"{path}.curriculum", sources)
        self.training.validate(f"{path}.training")


class ImportanceKind(str, Enum):
    activation = "activation"
    random = "random"


class Aggregation(str, Enum):
    mean = "mean"
    l2 = "l2"


@dataclass
class PruneSearchConfig:
    """Candidate architectures. Lists span a grid; a single value fixes an axis. Empty list = keep the parent's size."""

    num_layers: list[int] = field(default_factory=list)
    hidden_size: list[int] = field(default_factory=list)
    intermediate_size: list[int] = field(default_factory=list)
    mamba_num_heads: list[int] = field(default_factory=list)
    num_attention_layers: int = -1
    """Attention layers kept; -1 lets the importance decide."""
    max_parameters_fraction: float = 1.0
    """Budget: parameters of the candidate over those of the parent."""
    max_memory_bytes: int = 0
    """Budget: weights + KV + Mamba state at context_length and batch 1, bf16; 0 = no memory budget."""
    context_length: int = 131072
    top_candidates: int = 3
    """So many candidates, largest within the budget first, are scored by held-out loss without training."""


@dataclass
class PruneConfig(StageConfig):
    """Minitron structured pruning: layers by logit MSE, then hidden, FFN and Mamba heads by activation."""

    init_from: str = PREVIOUS
    data_from: str = PREVIOUS
    importance: ImportanceKind = ImportanceKind.activation
    """random = the baseline with the same sizes."""
    aggregation_batch: Aggregation = Aggregation.l2
    aggregation_sequence: Aggregation = Aggregation.mean
    calibration_samples: int = 1024
    calibration_sequence_length: int = 8192
    micro_batch_size: int = 1
    evaluation_tokens: int = 0
    """Held-out tokens scored per category for the parent and each candidate, spread evenly over its text; 0 = all."""
    search: PruneSearchConfig = field(default_factory=PruneSearchConfig)

    def validate(self, path: str) -> None:
        for name in ("calibration_samples", "micro_batch_size"):
            if self.__dict__[name] < 1:
                raise UserError(f"`{path}.{name}` ({self.__dict__[name]}) must be at least 1.")
        if self.calibration_sequence_length < 2:
            raise UserError(
                f"`{path}.calibration_sequence_length` ({self.calibration_sequence_length}) must be at least 2."
            )
        if self.evaluation_tokens < 0:
            raise UserError(f"`{path}.evaluation_tokens` ({self.evaluation_tokens}) must not be negative; 0 = all.")
        search = self.search
        if not 0 < search.max_parameters_fraction <= 1:
            raise UserError(
                f"`{path}.search.max_parameters_fraction` ({search.max_parameters_fraction}) must lie in (0, 1]."
            )
        for name in ("num_layers", "hidden_size", "intermediate_size", "mamba_num_heads"):
            if any(value < 1 for value in search.__dict__[name]):
                raise UserError(f"`{path}.search.{name}` ({search.__dict__[name]}) must hold values of at least 1.")
        for name, least in {"max_memory_bytes": 0, "context_length": 1, "top_candidates": 1}.items():
            if search.__dict__[name] < least:
                raise UserError(f"`{path}.search.{name}` ({search.__dict__[name]}) must be at least {least}.")


@dataclass
class DistillConfig(StageConfig):
    """Forward KL on full-vocabulary logits from a frozen teacher; no cross-entropy."""

    init_from: str = PREVIOUS
    teacher_from: str = MISSING
    data_from: str = PREVIOUS
    temperature: float = 1.0
    curriculum: list[PhaseConfig] = field(default_factory=list)
    training: TrainingConfig = field(default_factory=TrainingConfig)

    def validate(self, path: str) -> None:
        if not self.temperature > 0:
            raise UserError(f"`{path}.temperature` ({self.temperature}) must be greater than 0.")
        sources = None if names_a_folder(self.data_from) else CATEGORIES
        validate_curriculum(self.curriculum, f"{path}.curriculum", sources)
        self.training.validate(f"{path}.training")


@dataclass
class SftConfig(StageConfig):
    """Supervised fine-tuning on chat rows with reasoning traces, packed best-fit."""

    init_from: str = PREVIOUS
    data_from: str = PREVIOUS
    reasoning: ReasoningConfig = field(default_factory=ReasoningConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)

    def validate(self, path: str) -> None:
        self.reasoning.validate(f"{path}.reasoning")
        self.training.validate(f"{path}.training")


@dataclass
class EvaluateConfig(StageConfig):
    """Held-out bits per byte, verifiable tasks with reasoning on and off, and the thinking-budget curve."""

    init_from: str = PREVIOUS
    data_from: str = PREVIOUS
    sequence_length: int = MISSING
    """Of the held-out loss."""
    max_validation_tokens: int = 0
    """Held-out tokens per category; 0 = all."""
    num_prompts: int = MISSING
    """Held-out verifiable prompts."""
    generation_batch_size: int = 64
    thinking_budgets: list[int] = field(default_factory=list)
    """Tokens; the curve also gets one unlimited point."""
    thinking_grace: int = 500
    """Tokens after the budget within which a newline is waited for (paper section 3.4)."""
    max_new_tokens: int = MISSING
    temperature: float = 0.6
    top_p: float = 0.95

    def validate(self, path: str) -> None:
        for name in ("sequence_length", "num_prompts", "generation_batch_size", "max_new_tokens"):
            if self.__dict__[name] < 1:
                raise UserError(f"`{path}.{name}` ({self.__dict__[name]}) must be at least 1.")
        if any(budget < 0 for budget in self.thinking_budgets) or self.thinking_grace < 0:
            raise UserError(
                f"`{path}.thinking_budgets` ({self.thinking_budgets}) and `thinking_grace` ({self.thinking_grace})"
                " must not be negative."
            )
        if self.temperature < 0:
            raise UserError(f"`{path}.temperature` ({self.temperature}) must not be negative; 0 is greedy.")
        if not 0 < self.top_p <= 1:
            raise UserError(f"`{path}.top_p` ({self.top_p}) must lie in (0, 1].")


class SaveDtype(str, Enum):
    float32 = "float32"
    bfloat16 = "bfloat16"


@dataclass
class ExportConfig(StageConfig):
    """The deliverable: a Hugging Face folder in its final dtype, verified against transformers, with a model card."""

    init_from: str = PREVIOUS
    data_from: str = ""
    """Where the tokenizer comes from when the checkpoint folder holds none; empty = the checkpoint's own."""
    save_dtype: SaveDtype = SaveDtype.bfloat16


STAGE_CONFIGS: dict[str, type[StageConfig]] = {
    "prepare": PrepareConfig,
    "pretrain": PretrainConfig,
    "prune": PruneConfig,
    "distill": DistillConfig,
    "sft": SftConfig,
    "evaluate": EvaluateConfig,
    "export": ExportConfig,
}
"""The group `stage` of a recipe's defaults list."""

TRAINING_STAGES = (PretrainConfig, DistillConfig, SftConfig)
"""Those that run on every rank; the others run on the first one while the rest wait."""

PRODUCT_KINDS: dict[type[StageConfig], str] = {
    PrepareConfig: "data",
    PretrainConfig: "checkpoint",
    PruneConfig: "checkpoint",
    DistillConfig: "checkpoint",
    SftConfig: "checkpoint",
    EvaluateConfig: "report",
    ExportConfig: "checkpoint",
}
"""What each stage leaves: known before any stage is imported, so that a pipeline is checked without PyTorch."""
