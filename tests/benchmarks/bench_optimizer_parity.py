"""The quickstart's pretraining on the CPU with every form of AdamW: held-out loss after the same steps.

    python -m tests.benchmarks.bench_optimizer_parity OUT.jsonl PREPARED_FOLDER STEPS FORM ...      (400 steps: some minutes on one core)

All forms multiply in fp32, so that only the optimizer differs. bf16 weights live beside the model: gradients are rounded to
bf16, the update is the optimizer's own, and the model computes with the rounded weights.
"""

import sys
import time
from pathlib import Path

import torch

from nanotrain.config.engine import Device, EngineConfig, Precision
from nanotrain.config.load import load_recipe
from nanotrain.config.stage import PretrainConfig
from nanotrain.config.training import OptimizerConfig, ParameterDtype, StateDtype
from nanotrain.data.loader import PretrainLoader
from nanotrain.engines.parameters import is_narrowed
from nanotrain.engines.torch_engine import TorchEngine
from nanotrain.evaluation.held_out import held_out_bits_per_byte
from nanotrain.losses.language_modeling import CrossEntropy
from nanotrain.model.hybrid import HybridModel
from nanotrain.optim.adamw import build_adamw
from nanotrain.optim.lr_schedule import learning_rate
from tests.benchmarks.measure import write

FORMS = {
    "fp32": (StateDtype.fp32, ParameterDtype.fp32, 1),
    "bf16": (StateDtype.bf16, ParameterDtype.fp32, 1),
    "int8": (StateDtype.int8, ParameterDtype.fp32, 1),
    "fp32-bf16-weights": (StateDtype.fp32, ParameterDtype.bf16, 1),
    "bf16-bf16-weights": (StateDtype.bf16, ParameterDtype.bf16, 1),
    "int8-bf16-weights": (StateDtype.int8, ParameterDtype.bf16, 1),
    "int8-all-weights-bf16": (StateDtype.int8, ParameterDtype.bf16, 1),
    "fp32-seed-2": (StateDtype.fp32, ParameterDtype.fp32, 2),
}
"""Weights in bf16 are the matrices, as the engine does it; `all` means norms and convolutions too."""


class ShadowEngine(TorchEngine):
    """Keeps bf16 weights beside an fp32 model and updates those, once `use` was called."""

    shadow: dict[str, torch.nn.Parameter] | None = None

    def use(self, optimizer: OptimizerConfig, everything: bool) -> None:
        self.shadow = {name: torch.nn.Parameter(p.detach().clone()) for name, p in self._model.named_parameters()}
        for name, parameter in self.shadow.items():
            if is_narrowed(parameter) or (everything and not name.endswith(("A_log", ".D", "dt_bias"))):
                parameter.data = parameter.data.bfloat16()
        self._optimizer = build_adamw(self.shadow.items(), optimizer, 1.0)
        self._copy()

    @torch.no_grad()
    def _copy(self) -> None:
        for name, parameter in self._model.named_parameters():
            parameter.copy_(self.shadow[name])

    def _update(self, loss: float, norm: torch.Tensor) -> tuple[float, bool]:
        if self.shadow is None:
            return super()._update(loss, norm)
        for name, parameter in self._model.named_parameters():
            self.shadow[name].grad = parameter.grad.to(self.shadow[name].dtype)
            parameter.grad = None
        model, self._model = self._model, torch.nn.ParameterList(self.shadow.values())
        result = super()._update(loss, norm)
        self._model = model
        self._copy()
        return result


def run(form: str, prepared: Path, out: Path, steps: int) -> None:
    states, weights, seed = FORMS[form]
    stage = load_recipe("recipes/quickstart/pretrain.yaml").entries[0].config.stage
    assert isinstance(stage, PretrainConfig)
    training = stage.training
    training.steps = steps
    training.schedule.warmup_steps, training.schedule.decay_steps = steps // 20, steps * 3 // 10
    optimizer = OptimizerConfig(state_dtype=states, parameter_dtype=weights)
    training.optimizer = optimizer if weights is ParameterDtype.fp32 else OptimizerConfig()
    engine = ShadowEngine(
        EngineConfig(device=Device.cpu, precision=Precision.fp32, threads=1), HybridModel(stage.model), training
    )
    engine.init_weights(seed)
    if weights is ParameterDtype.bf16:
        engine.use(optimizer, everything="all" in form)
    loader = PretrainLoader(prepared / "data", stage.curriculum, training, 1)
    started, losses = time.perf_counter(), []
    for step in range(training.steps):
        result = engine.train_step(loader.microbatches(step), CrossEntropy(), learning_rate(step, training))
        assert not result.skipped
        losses.append(result.loss)
        if step % 50 == 49:
            print(form, step + 1, sum(losses[-50:]) / 50, flush=True)
    scores = held_out_bits_per_byte(
        engine, prepared / "data", sequence_length=training.sequence_length,
        micro_batch_size=training.micro_batch_size, max_tokens=20480,
    )  # fmt: skip
    write(out, {
        "form": form, "steps": steps, "held_out": scores["loss"], "bits_per_byte": scores["average"],
        "train_last_50": sum(losses[-50:]) / 50, "seconds": time.perf_counter() - started,
        "curve": [round(sum(losses[i : i + 20]) / 20, 4) for i in range(0, len(losses), 20)],
    })  # fmt: skip


if __name__ == "__main__":
    for chosen in sys.argv[4:]:
        run(chosen, Path(sys.argv[2]), Path(sys.argv[1]), int(sys.argv[3]))
