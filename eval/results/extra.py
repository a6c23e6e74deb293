"""Optional metrics in per cent, computed only on request, as by `evaluation.extra_metrics`. Each has a prefix:

- boundary_: Boundary PQ and Boundary AP.
- box_: AP of boxes.
- class_agnostic_: recall of instances, regardless of class.
- cityscapes_: AP, IoU and iIoU as the Cityscapes benchmark defines them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from m2f.data_pipeline.categories import Category
from m2f.eval.metrics.average_precision import AveragePrecision
from m2f.eval.metrics.cityscapes_ap import CityscapesAP
from m2f.eval.metrics.cityscapes_iou import CityscapesIoU
from m2f.eval.metrics.panoptic_quality import PanopticQuality

Numbers = dict[str, float | None]
"""Values by name, in per cent; None for an undefined value."""


class Group(NamedTuple):
    """Values of one metric, shown as one table."""

    title: str
    prefix: str
    """Prefix of the metrics' full names."""
    numbers: Numbers


@dataclass(frozen=True, kw_only=True)
class ExtraResults:
    """Results of the extra metrics; None for those that were not requested."""

    boundary_panoptic: PanopticQuality | None = None
    boundary_instance: AveragePrecision | None = None
    box_instance: AveragePrecision | None = None
    class_agnostic: AveragePrecision | None = None
    cityscapes_instance: CityscapesAP | None = None
    cityscapes_semantic: CityscapesIoU | None = None

    def groups(self) -> list[Group]:
        """Return one group for every requested metric."""
        groups: list[Group] = []
        if self.boundary_panoptic is not None:
            groups.append(Group("boundary", "boundary_", _panoptic_numbers(self.boundary_panoptic)))
        if self.boundary_instance is not None:
            stats = {name: _defined(value) for name, value in self.boundary_instance.stats.items()}
            groups.append(Group("boundary mask", "boundary_", stats))
        if self.box_instance is not None:
            stats = {name: _defined(value) for name, value in self.box_instance.stats.items()}
            groups.append(Group("box", "box_", stats))
        if self.class_agnostic is not None:
            recalls = {n: _defined(value) for n, value in self.class_agnostic.stats.items() if n.startswith("AR")}
            groups.append(Group("class-agnostic", "class_agnostic_", recalls))
        if self.cityscapes_instance is not None:
            result = self.cityscapes_instance
            numbers = {"AP": _percent(result.ap), "AP50": _percent(result.ap50)}
            groups.append(Group("Cityscapes instances", "cityscapes_", numbers))
        if self.cityscapes_semantic is not None:
            result = self.cityscapes_semantic
            shares = {
                "IoU": result.iou,
                "iIoU": result.iiou,
                "IoU_categories": result.group_iou,
                "iIoU_categories": result.group_iiou,
            }
            numbers = {name: _percent(share) for name, share in shares.items()}
            groups.append(Group("Cityscapes semantic", "cityscapes_", numbers))
        return groups

    def metrics(self) -> Numbers:
        """Return all values by full name (prefix and name)."""
        return {f"{g.prefix}{name}": value for g in self.groups() for name, value in g.numbers.items()}

    def class_values(self, category: Category, label: int, thing_label: int | None) -> Numbers:
        """Return the values of one category.

        `label` is its class index in the panoptic task, and `thing_label` that in the instance task (None for stuff).
        """
        row: Numbers = {}
        if self.boundary_panoptic is not None:
            quality = self.boundary_panoptic.per_class[label]
            row["boundary_PQ"] = 100 * quality.pq if quality.occurs else None
        if self.boundary_instance is not None:
            value = -1.0 if thing_label is None else self.boundary_instance.per_class[thing_label]
            row["boundary_AP"] = _defined(value)
        if self.box_instance is not None:
            value = -1.0 if thing_label is None else self.box_instance.per_class[thing_label]
            row["box_AP"] = _defined(value)
        if self.cityscapes_instance is not None:
            known = self.cityscapes_instance.per_class.get(category.id)
            row["cityscapes_AP"] = None if known is None else 100 * known[0]
        if self.cityscapes_semantic is not None:
            row["cityscapes_IoU"] = _percent(self.cityscapes_semantic.per_class.get(category.id))
            row["cityscapes_iIoU"] = _percent(self.cityscapes_semantic.per_class_iiou.get(category.id))
        return row


def _panoptic_numbers(result: PanopticQuality) -> Numbers:
    numbers: Numbers = {}
    for suffix, quality in (("", result.all), ("_th", result.things), ("_st", result.stuff)):
        shares = (None, None, None) if quality is None else (quality.pq, quality.sq, quality.rq)
        numbers |= {f"{n}{suffix}": _percent(share) for n, share in zip(("PQ", "SQ", "RQ"), shares, strict=True)}
    return numbers


def _defined(value: float) -> float | None:
    """Convert a COCO value, 0 to 1, to per cent. Return None for -1, which COCO uses if there are no annotations."""
    return None if value < 0 else 100 * value


def _percent(share: float | None) -> float | None:
    return None if share is None else 100 * share
