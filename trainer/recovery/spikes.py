"""Loss spikes: a robust look at the losses of the last steps, the same on all ranks and after every resume."""

from __future__ import annotations

from dataclasses import dataclass
from statistics import median

from m2f.trainer.config import SpikeConfig

_SIGMA_PER_MAD = 1.4826  # of a normal distribution
_LEAST_SIGMA = 0.01  # of the median: a loss that hardly moves has no spikes of a thousandth


@dataclass(frozen=True)
class LossHistory:
    """Losses of the last steps, all-reduced: part of the run's state, so that a resumed run decides alike."""

    recent: tuple[float, ...] = ()
    """At most `window` of them, oldest first; those of skipped steps are not among them."""
    high: int = 0
    """How many of the last steps in a row were too high."""
    start: int = 0
    """Position of the data order where the first of these steps began."""

    def after(self, loss: float, position: int, config: SpikeConfig) -> LossHistory:
        """With the loss of the step that began at `position`."""
        high = self.high + 1 if self._is_high(loss, config) else 0
        start = self.start if high > 1 else position
        return LossHistory((*self.recent, loss)[-config.window :], high, start)

    def usual(self) -> tuple[float, float]:
        """Median and robust standard deviation of the recent losses."""
        middle = median(self.recent)
        deviation = median(abs(loss - middle) for loss in self.recent)
        return middle, max(_SIGMA_PER_MAD * deviation, _LEAST_SIGMA * abs(middle))

    def _is_high(self, loss: float, config: SpikeConfig) -> bool:
        if len(self.recent) < config.window:
            return False
        middle, sigma = self.usual()
        return loss > middle + config.threshold * sigma
