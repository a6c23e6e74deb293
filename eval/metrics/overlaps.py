"""Count the pixels that segments of two id maps share, in one pass over the maps."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from m2f.data_pipeline.sample import VOID_ID

DENSE_IDS = 512
"""If all ids are below this number, they are used directly as positions in the table of pairs."""


class InconsistentMapError(ValueError):
    """Two maps, or a map and a table, that do not match each other."""


class InconsistentTruthError(InconsistentMapError):
    """The truth's map and its table do not match each other."""


class Overlaps(NamedTuple):
    """Pixel counts of the ids of two maps and of pairs of ids; entries without a pixel are omitted."""

    truth_area: dict[int, int]
    predicted_area: dict[int, int]
    pixels: dict[tuple[int, int], int]
    """Shared pixels by (truth id, predicted id), in ascending order."""

    def iou(self, truth_id: int, predicted_id: int, truth_area: float) -> float:
        """Return the intersection over union, ignoring predicted pixels in void of the truth; 0 if nothing is shared.

        `truth_area` is used in the union, because the annotated area may differ from the number of pixels.
        """
        shared = self.pixels.get((truth_id, predicted_id), 0)
        if not shared:  # the union can be 0: a segment without pixels, and a prediction only in void
            return 0.0
        in_void = self.pixels.get((VOID_ID, predicted_id), 0)
        return shared / (self.predicted_area[predicted_id] + truth_area - shared - in_void)


def count_overlaps(truth: np.ndarray, predicted: np.ndarray) -> Overlaps:
    """Count the overlaps of two id maps [H, W] of integers. Raises InconsistentMapError if they differ in size."""
    if truth.shape != predicted.shape:
        raise InconsistentMapError(f"the truth has shape {truth.shape}, but the prediction has {predicted.shape}")
    truth_values, predicted_values, lengths = common_runs(truth, predicted)
    truth_ids, rows = compact_ids(truth_values)
    predicted_ids, columns = compact_ids(predicted_values)
    # numpy adds int64 and uint64 as float64, so both need one type.
    cell = rows.astype(np.intp) * len(predicted_ids) + columns.astype(np.intp)
    table = np.bincount(cell, weights=lengths, minlength=len(truth_ids) * len(predicted_ids)).astype(np.int64)
    table = table.reshape(len(truth_ids), len(predicted_ids))
    return Overlaps(
        truth_area={i: n for i, n in zip(truth_ids, table.sum(axis=1).tolist(), strict=True) if n},
        predicted_area={i: n for i, n in zip(predicted_ids, table.sum(axis=0).tolist(), strict=True) if n},
        pixels={
            (truth_ids[row], predicted_ids[column]): int(table[row, column])
            for row, column in zip(*(positions.tolist() for positions in table.nonzero()), strict=True)
        },
    )


def common_runs(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return runs of pixels, row by row, in which both maps are constant: values of a and b, and lengths [runs] int64.

    Segments are wide, so there are far fewer runs than pixels.
    """
    flat_a, flat_b = a.ravel(), b.ravel()
    if not flat_a.size:
        return flat_a, flat_b, np.zeros(0, dtype=np.int64)
    changes = (flat_a[1:] != flat_a[:-1]) | (flat_b[1:] != flat_b[:-1])
    starts = np.concatenate([[0], changes.nonzero()[0] + 1])
    return flat_a[starts], flat_b[starts], np.diff(starts, append=len(flat_a))


def compact_ids(ids: np.ndarray) -> tuple[list[int], np.ndarray]:
    """Return ids in ascending order (a superset of those present), and the position of each element in them."""
    largest = int(ids.max(initial=0))
    if largest < DENSE_IDS and int(ids.min(initial=0)) >= 0:
        return list(range(largest + 1)), ids
    present, positions = np.unique(ids, return_inverse=True)
    return present.tolist(), positions.reshape(ids.shape)
