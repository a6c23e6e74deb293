"""Settings of EoMT (standard library only)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from m2f.model.errors import ConfigError
from m2f.model.limits import FROM_0, FROM_1, STEPS_FROM_0, Section


@dataclass(frozen=True, kw_only=True)
class UpscalePixelDecoderConfig(Section):
    """Transposed convolutions from the tokens of a plain vision transformer to per-pixel embeddings (EoMT)."""

    kind: Literal["upscale"] = "upscale"


@dataclass(frozen=True, kw_only=True)
class EomtDecoderConfig(Section):
    """Queries inside the last blocks of a plain vision transformer (EoMT, Kerssies et al., CVPR 2025).

    Needs `backbone.features` tokens and `pixel_decoder.kind` upscale.
    """

    kind: Literal["eomt"] = "eomt"
    num_queries: Annotated[int, FROM_1] = 200
    """Number of queries: the maximum number of segments per image."""
    num_layers: Annotated[int, FROM_1] = 4
    """Number of last blocks of the backbone that process the queries. The authors use 3 for S and B, 4 for L and 5 for
    giant."""
    annealing: Annotated[tuple[tuple[int, int], ...] | None, STEPS_FROM_0] = None
    """For each of these blocks, the steps at which its attention masks start to vanish and have vanished. None spreads
    them over the run: the first block starts at one sixth and the last at four sixths, and each takes one sixth."""
    annealing_power: Annotated[float, FROM_0] = 0.9
    """Exponent of the decay of the mask probability between these steps; 1 is linear."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.annealing is None:
            return
        where = f"model.transformer_decoder.annealing is {[list(pair) for pair in self.annealing]}"
        if len(self.annealing) != self.num_layers:
            raise ConfigError(f"{where}; it needs one pair of steps for each of num_layers ({self.num_layers})")
        if any(end < start for start, end in self.annealing):
            raise ConfigError(f"{where}; no end may be before its start")
