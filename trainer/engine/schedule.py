"""Learning-rate schedules as pure functions of the step."""

from __future__ import annotations

from bisect import bisect_right
from typing import assert_never

from m2f.trainer.config import MultiStepSchedule, PolySchedule, ScheduleConfig


def lr_factor(config: ScheduleConfig, step: int, max_steps: int) -> float:
    """Factor on every group's learning rate for the update that follows `step` finished ones (0 = the first).

    Warm-up rises linearly from 1 / (warmup_steps + 1) and multiplies the schedule, which does not wait for it.
    """
    match config:
        case PolySchedule(power=power):
            factor = max(0.0, 1.0 - step / max_steps) ** power
        case MultiStepSchedule(milestones=milestones, gamma=gamma):
            factor = gamma ** bisect_right(sorted(milestones), step)
        case _:
            assert_never(config)
    return factor * min(1.0, (step + 1) / (config.warmup_steps + 1))
