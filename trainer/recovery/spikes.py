"""Detect loss spikes with robust statistics. Decisions are the same on all ranks and after every resume."""

from __future__ import annotations

from dataclasses import dataclass
from statistics import median

from m2f.trainer.config import SpikeConfig

_SIGMA_PER_MAD = 1.4826  # for a normal distribution
_MIN_SIGMA = 0.01  # relative to the median; prevents tiny spikes if the loss hardly changes


@dataclass(frozen=True)
class LossHistory:
    """Losses of the last steps, summed over all ranks. Part of the run's state, so a resumed run decides the same."""

    recent: tuple[float, ...] = ()
    """At most `window` losses, oldest first, without those of skipped steps."""
    high: int = 0
    """Number of consecutive last steps with too high a loss."""
    start: int = 0
    """Position of the data order at which the first of these steps started; meaningless if `high` is 0."""

    def after(self, loss: float, position: int, config: SpikeConfig) -> LossHistory:
        """Return the history with the loss of the step that started at `position`."""
        high = self.high + 1 if self._is_high(loss, config) else 0
        start = self.start if high > 1 else position
        return LossHistory((*self.recent, loss)[-config.window :], high, start)

    def typical(self) -> tuple[float, float]:
        """Return median and robust standard deviation of the recent losses."""
        middle = median(self.recent)
        deviation = median(abs(loss - middle) for loss in self.recent)
        return middle, max(_SIGMA_PER_MAD * deviation, _MIN_SIGMA * abs(middle))

    def _is_high(self, loss: float, config: SpikeConfig) -> bool:
        if len(self.recent) < config.window:
            return False
        middle, sigma = self.typical()
        return loss > middle + config.threshold * sigma
