"""The learning rate as a pure function of the step: nothing to save, nothing to resume."""

import math

from nanotrain.config.training import DecayShape, ScheduleConfig, ScheduleKind, TrainingConfig


def learning_rate(step: int, training: TrainingConfig) -> float:
    """Return the learning rate of one optimizer step.

    Warm-up is linear and starts above zero: step s of W gets (s + 1) / W of the peak, so its last step has all of it. A
    decay over d steps ends exactly at `min_learning_rate` in the last step of the run; its first step is 1/d of the way.

    Args:
        step: 0 ... steps - 1.
        training: steps, peak and schedule.
    """
    schedule, peak, steps = training.schedule, training.learning_rate, training.steps
    assert 0 <= step < steps, (step, steps)
    if step < schedule.warmup_steps:
        return peak * (step + 1) / schedule.warmup_steps
    length, shape = _decay(schedule, steps)
    steps_left = steps - 1 - step
    if steps_left >= length:
        return peak
    remaining = remaining_share((length - steps_left) / length, shape)
    return schedule.min_learning_rate + (peak - schedule.min_learning_rate) * remaining


def _decay(schedule: ScheduleConfig, steps: int) -> tuple[int, DecayShape]:
    """Return the length of the final decay in steps (0 = none) and its shape."""
    if schedule.kind is ScheduleKind.constant:
        return 0, schedule.decay_shape
    if schedule.kind is ScheduleKind.cosine:
        return steps - schedule.warmup_steps, DecayShape.cosine
    return schedule.decay_steps, schedule.decay_shape


def remaining_share(progress: float, shape: DecayShape) -> float:
    """Return the share of (peak - minimum) that is left after `progress` in [0, 1] of a decay; 1 at 0, 0 at 1."""
    if shape is DecayShape.linear:
        return 1.0 - progress
    if shape is DecayShape.minus_sqrt:
        return 1.0 - math.sqrt(progress)
    return 0.5 * (1.0 + math.cos(math.pi * progress))
