"""Turns step results into the line of numbers that the progress bar, metrics.jsonl and the trackers show."""

import time
from dataclasses import dataclass
from typing import Any

from tqdm import tqdm

from nanotrain.config.training import TrainingConfig
from nanotrain.engines.base import Engine, StepResult
from nanotrain.planning.flops import training_flops_per_token
from nanotrain.runtime.timing import (
    device_name,
    eta_seconds,
    memory_bytes,
    mfu,
    peak_flops_per_second,
    tokens_per_second,
)


@dataclass(frozen=True)
class StepTimes:
    """Wall clock of one step, in seconds."""

    data: float
    """Waiting for micro-batches; what is loaded ahead costs nothing here."""
    step: float
    """Forward, backward and update; an online teacher's forward passes too."""
    communication: float | None
    """Of `step`, waiting for collectives (`Engine.communication_seconds`); None where that is not measured."""


class Meter:
    """Keeps time over restarts, and rates since the last line.

    Rates count the tokens that the model read (input tokens), as the FLOPs do, not those that count in the loss.
    """

    def __init__(self, engine: Engine, training: TrainingConfig, seconds_before: float = 0.0) -> None:
        self._device_type = engine.device.type
        self._steps = training.steps
        self._flops_per_token = training_flops_per_token(engine.model_config, training.sequence_length)
        peak = peak_flops_per_second(device_name(self._device_type))
        self._peak = None if peak is None else peak * engine.num_devices
        self._seconds_before = seconds_before
        self._start = time.perf_counter()
        self._steps_here = 0
        self._busy = 0.0
        self._window_tokens = 0
        self._window: list[StepTimes] = []

    @property
    def seconds(self) -> float:
        """Wall clock of the loop, all attempts together."""
        return self._seconds_before + time.perf_counter() - self._start

    def count(self, tokens: int, times: StepTimes) -> None:
        """Add one step: tokens read by all ranks, and its wall clock."""
        self._steps_here += 1
        self._busy += times.data + times.step
        self._window_tokens += tokens
        self._window.append(times)

    def line(self, step: int, result: StepResult, learning_rate: float, tokens: int) -> dict[str, Any]:
        """Return the numbers after `step` steps and start a new window for the rates.

        `mfu` is None where the device's peak is unknown (CPU); the three parts of a step are means over the window,
        on this rank. `communication_seconds` is None where it is not measured, and then part of `compute_seconds`.
        """
        tokens_window, window = self._window_tokens, self._window
        self._window_tokens, self._window = 0, []
        seconds = sum(times.data + times.step for times in window)
        known = [times.communication for times in window if times.communication is not None]
        communication = sum(known) / len(window) if window and len(known) == len(window) else None
        compute = sum(times.step for times in window) / max(len(window), 1)
        return {
            "loss": result.loss,
            "grad_norm": result.grad_norm,
            "lr": learning_rate,
            "tokens_per_second": tokens_per_second(tokens_window, seconds),
            "mfu": mfu(self._flops_per_token * tokens_window, seconds, self._peak),
            "memory_bytes": memory_bytes(self._device_type),
            "eta_seconds": eta_seconds(self._steps_here, self._steps_here + self._steps - step, self._busy),
            "data_seconds": sum(times.data for times in window) / max(len(window), 1),
            "compute_seconds": compute - (communication or 0.0),
            "communication_seconds": communication,
            "seconds": self.seconds,
            "tokens": tokens,
            "loss_tokens": result.num_tokens,
            "skipped": result.skipped,
            **result.metrics,
        }


BAR_FORMAT = "{desc} {n_fmt}/{total_fmt}{postfix} |{bar}|"
"""The bar takes what room is left: a full line fits into 100 columns with several GPUs, too."""


def describe(line: dict[str, Any]) -> str:
    """Return the short form of a line for the progress bar; what is not measured, or did not happen, is left out."""
    parts = [
        f"loss {line['loss']:.4f}",
        f"grad {line['grad_norm']:.3g}",
        f"{line['tokens_per_second']:,.0f} tok/s",
    ]
    if line["mfu"] is not None:
        parts.append(f"mfu {line['mfu']:.0%}")
    parts.append(f"{line['memory_bytes'] / 2**30:.1f}G")
    shares = {"data": line["data_seconds"], "comm": line["communication_seconds"]}
    step_seconds = sum(shares[name] or 0.0 for name in shares) + line["compute_seconds"]
    parts += [f"{name} {part / step_seconds:.0%}" for name, part in shares.items() if part is not None and step_seconds]
    for name, key in (("eval", "evaluation_seconds"), ("save", "save_stall_seconds")):
        if line.get(key):
            parts.append(f"{name} {line[key]:.2g}s")
    parts.append(f"eta {tqdm.format_interval(line['eta_seconds'])}")
    return " ".join(parts)
