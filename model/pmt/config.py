"""Settings of PMT (standard library only)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from m2f.model.errors import ConfigError
from m2f.model.limits import ABOVE_0, FROM_0, FROM_1, STEPS_FROM_0, Section


@dataclass(frozen=True, kw_only=True)
class PmtDecoderConfig(Section):
    """Queries and patches in new blocks on top of a plain vision transformer (PMT, arXiv 2603.25398).

    Needs `backbone.features` tokens and `pixel_decoder.kind` upscale. The authors freeze the backbone (`freeze:
    [backbone]`). The new blocks have the backbone's width and number of heads.
    """

    kind: Literal["pmt"] = "pmt"
    num_queries: Annotated[int, FROM_1] = 200
    """Number of queries: the maximum number of segments per image."""
    num_layers: Annotated[int, FROM_1] = 6
    """Number of new blocks on top of the backbone."""
    mlp_ratio: Annotated[float, ABOVE_0] = 1.0
    """Hidden width of the MLP in a new block, relative to the backbone's width."""
    levels: Annotated[tuple[int, ...] | None, FROM_0] = None
    """Blocks of the backbone, from 0, whose output tokens are summed as the input of the new blocks. None takes the
    last block of each quarter: 5, 11, 17 and 23 of 24."""
    annealing: Annotated[tuple[tuple[int, int], ...] | None, STEPS_FROM_0] = None
    """For each new block, the steps at which its attention masks start to vanish and have vanished. None uses the
    authors' schedule. The first block takes the first 3000 steps, at most a sixth of the run. The others start evenly
    from 4/15 to 2/3 of the run, and each takes a sixth."""
    annealing_power: Annotated[float, FROM_0] = 0.9
    """Exponent of the decay of the mask probability between these steps; 1 is linear."""

    def __post_init__(self) -> None:
        super().__post_init__()
        where = "model.transformer_decoder"
        if self.levels is not None and (not self.levels or list(self.levels) != sorted(set(self.levels))):
            raise ConfigError(f"{where}.levels is {list(self.levels)}; it must list blocks in ascending order")
        if self.annealing is None:
            return
        found = f"{where}.annealing is {[list(pair) for pair in self.annealing]}"
        if len(self.annealing) != self.num_layers:
            raise ConfigError(f"{found}; it needs one pair of steps for each of num_layers ({self.num_layers})")
        if any(end < start for start, end in self.annealing):
            raise ConfigError(f"{found}; no end may be before its start")
