"""How many pixels every pair of segments of two id maps shares, from one pass over the maps."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from data_pipeline.sample import VOID_ID

DENSE_IDS = 512
"""Id maps whose largest id is below this index the pair table directly."""


class InconsistentMapError(ValueError):
    """Maps that do not belong together, or a map and a table that do not."""


class Overlaps(NamedTuple):
    """Pixels of the ids of two maps and of their pairs; only what has a pixel."""

    truth_area: dict[int, int]
    predicted_area: dict[int, int]
    pixels: dict[tuple[int, int], int]
    """(truth id, predicted id) -> shared pixels, in ascending order."""

    def iou(self, truth_id: int, predicted_id: int, truth_area: float) -> float:
        """Intersection over union without the predicted pixels in the truth's void.

        `truth_area` enters the union, as the annotation may state an area that differs from its pixels.
        """
        shared = self.pixels.get((truth_id, predicted_id), 0)
        in_void = self.pixels.get((VOID_ID, predicted_id), 0)
        return shared / (self.predicted_area[predicted_id] + truth_area - shared - in_void)


def count_overlaps(truth: np.ndarray, predicted: np.ndarray) -> Overlaps:
    """Overlaps of two id maps [H, W] of integers. Raises InconsistentMapError if they differ in size."""
    if truth.shape != predicted.shape:
        raise InconsistentMapError(f"the truth has the shape {truth.shape}, the prediction {predicted.shape}")
    truth_ids, rows = compact_ids(truth)
    predicted_ids, columns = compact_ids(predicted)
    cell = rows.astype(np.intp)
    cell *= len(predicted_ids)
    cell += columns
    table = np.bincount(cell.ravel(), minlength=len(truth_ids) * len(predicted_ids))
    table = table.reshape(len(truth_ids), len(predicted_ids))
    return Overlaps(
        truth_area={i: n for i, n in zip(truth_ids, table.sum(axis=1).tolist(), strict=True) if n},
        predicted_area={i: n for i, n in zip(predicted_ids, table.sum(axis=0).tolist(), strict=True) if n},
        pixels={
            (truth_ids[row], predicted_ids[column]): int(table[row, column])
            for row, column in zip(*(positions.tolist() for positions in table.nonzero()), strict=True)
        },
    )


def compact_ids(id_map: np.ndarray) -> tuple[list[int], np.ndarray]:
    """Ids, ascending (a superset of those present), and the map of positions in them.

    Large ids are sorted once per horizontal run of equal pixels instead of once per pixel.
    """
    largest = int(id_map.max(initial=0))
    if largest < DENSE_IDS and int(id_map.min(initial=0)) >= 0:
        return list(range(largest + 1)), id_map
    flat = id_map.ravel()
    starts = np.concatenate([[0], np.flatnonzero(flat[1:] != flat[:-1]) + 1])
    ids, positions = np.unique(flat[starts], return_inverse=True)
    lengths = np.diff(starts, append=len(flat))
    return ids.tolist(), np.repeat(positions, lengths).reshape(id_map.shape)
