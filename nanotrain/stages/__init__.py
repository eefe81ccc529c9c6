"""The table of stages: the class of `stage` in a recipe selects the function."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from nanotrain.config.stage import (
    DistillConfig,
    EvaluateConfig,
    ExportConfig,
    PrepareConfig,
    PretrainConfig,
    PruneConfig,
    SftConfig,
    StageConfig,
)
from nanotrain.runtime.run import Run
from nanotrain.stages.distill import distill
from nanotrain.stages.evaluate import evaluate
from nanotrain.stages.export import export
from nanotrain.stages.prepare import prepare
from nanotrain.stages.pretrain import pretrain
from nanotrain.stages.prune import prune
from nanotrain.stages.sft import sft

STAGES: dict[type[StageConfig], Callable[[Any, Run], Path]] = {
    PrepareConfig: prepare,
    PretrainConfig: pretrain,
    PruneConfig: prune,
    DistillConfig: distill,
    SftConfig: sft,
    EvaluateConfig: evaluate,
    ExportConfig: export,
}
