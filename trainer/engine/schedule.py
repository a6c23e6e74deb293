"""Learning-rate schedules as pure functions of the step."""

from __future__ import annotations

import math
from bisect import bisect_right
from typing import assert_never

from m2f.trainer.config import (
    CosineSchedule,
    MultiStepSchedule,
    PolySchedule,
    ScheduleConfig,
    StagedPolySchedule,
    TrainingConfig,
)


def lr_factor(config: ScheduleConfig, step: int, max_steps: int) -> float:
    """Return the factor on every group's learning rate for the update after `step` finished ones (0: the first update).

    Warm-up rises linearly from 1 / (warmup_steps + 1) and multiplies the schedule. The schedule runs during warm-up
    too, except for the cosine, which starts after it. StagedPolySchedule differs: it rises from 0, starts its decay
    after warm-up, and has another factor for the backbone (see `backbone_lr_factor`).
    """
    match config:
        case PolySchedule(power=power):
            factor = max(0.0, 1.0 - step / max_steps) ** power
        case MultiStepSchedule(milestones=milestones, gamma=gamma):
            factor = gamma ** bisect_right(sorted(milestones), step)
        case CosineSchedule(warmup_steps=warmup_steps):
            share = max(0, step - warmup_steps) / max(1, max_steps - warmup_steps)
            factor = 0.5 + 0.5 * math.cos(math.pi * min(1.0, share))
        case StagedPolySchedule():
            return _warm_then_poly(step, config.warmup_steps, max_steps, config.power)
        case _:
            assert_never(config)
    return factor * min(1.0, (step + 1) / (config.warmup_steps + 1))


def backbone_lr_factor(config: ScheduleConfig, step: int, max_steps: int) -> float:
    """Return the factor for the groups of the backbone. It equals `lr_factor`, except for StagedPolySchedule."""
    match config:
        case StagedPolySchedule():
            first, length = config.warmup_steps, config.backbone_warmup_steps
            return _warm_then_poly(step - first, length, max_steps - first, config.power)
        case _:
            return lr_factor(config, step, max_steps)


def schedule_warnings(training: TrainingConfig) -> list[str]:
    """Return a line for each part of the schedule that begins after the last step; `max_epochs` must be resolved.

    This happens if `max_steps` is lowered and the schedule is not.
    """
    schedule, max_steps = training.schedule, training.max_steps
    warmup_steps, late = schedule.warmup_steps, []
    if isinstance(schedule, StagedPolySchedule):
        warmup_steps += schedule.backbone_warmup_steps
    if isinstance(schedule, MultiStepSchedule):
        late = [milestone for milestone in schedule.milestones if milestone >= max_steps]
    warnings: list[str] = []
    if warmup_steps >= max_steps:
        warnings.append(
            f"warm-up takes {warmup_steps} steps, but training.max_steps is {max_steps}, so the learning rate stays "
            "below its full value; shorten the warm-up in training.schedule"
        )
    if late:
        warnings.append(
            f"training.max_steps is {max_steps}, so the learning rate does not drop at {late} "
            "(training.schedule.milestones); adapt the milestones to the number of steps"
        )
    return [f"warning: {text}" for text in warnings]


def _warm_then_poly(step: int, warmup_steps: int, max_steps: int, power: float) -> float:
    """Return a factor that rises linearly from 0 to 1 in `warmup_steps`, then falls polynomially to 0 at `max_steps`.

    It is 0 before step 0.
    """
    if step < 0:
        return 0.0
    if step < warmup_steps:
        return step / warmup_steps
    return max(0.0, 1.0 - (step - warmup_steps) / max(1, max_steps - warmup_steps)) ** power
