"""Permanently bad samples over all ranks: each is reported, and too many end the run."""

from __future__ import annotations

from collections.abc import Sequence

from m2f.data_pipeline.errors import DataError
from m2f.data_pipeline.loading.decode import Substitution
from m2f.trainer.ranks import Ranks


class BadSamples:
    """Bad samples that any rank has met in this attempt; equal on all ranks."""

    def __init__(self, limit: int, ranks: Ranks) -> None:
        """`limit` is the setting `data.max_bad_samples`."""
        self._limit, self._ranks = limit, ranks
        self._causes: dict[str, str] = {}

    def add(self, substitutions: Sequence[Substitution]) -> list[Substitution]:
        """Add this rank's substitutions of a step; return those of all ranks, ordered by position.

        Every rank must call it.

        Raises DataError on all ranks if more distinct samples are bad than the limit allows.
        """
        found = sorted(
            (substitution for of_rank in self._ranks.gather(list(substitutions)) for substitution in of_rank),
            key=lambda substitution: substitution.position,
        )
        self._causes |= {substitution.key: substitution.cause for substitution in found}
        if len(self._causes) > self._limit:
            raise DataError(
                f"{len(self._causes)} samples are bad, more than data.max_bad_samples ({self._limit}): "
                f"{'; '.join(self._causes.values())}"
            )
        return found
