"""Results of one evaluation: as JSON, as metrics for experiment tracking, and as a table for a terminal.

Methods return per cent, as in papers. The fields hold what the metric modules compute, which are shares.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from m2f.data_pipeline.categories import CategoryTable
from m2f.eval.metrics.average_precision import AveragePrecision
from m2f.eval.metrics.base import percent
from m2f.eval.metrics.error_types import ErrorCosts
from m2f.eval.metrics.mean_iou import MeanIoU
from m2f.eval.metrics.panoptic_quality import PanopticQuality, Quality
from m2f.eval.metrics.segment_errors import SegmentErrors
from m2f.eval.results.extra import ExtraResults
from m2f.eval.results.settings import EvaluationSettings
from m2f.model.format_count import format_count

Number = float | int | None


@dataclass(frozen=True, kw_only=True)
class EvaluationSubject:
    """What was evaluated, and on which data."""

    dataset: str
    """Name of the data set under `datasets`."""
    name: str | None = None
    """Name of the evaluation set, if it differs from that of the data set."""
    fingerprint: str
    """Fingerprint of the data set's manifest."""
    subset: str | None = None
    """How the images were chosen, such as `first 500 of 5000`; None: all of them."""
    classes: str | None = None
    """Note on classes that are left out, or on the only ones that are scored; None: all classes are scored."""
    test_time: str | None = None
    """How the model processed the images; None for one pass over the whole image."""
    step: int | None = None
    """Optimizer step of the checkpoint; None for weights without a checkpoint."""
    settings: EvaluationSettings | None = None
    """Other settings that determine the results; None if they are not known."""

    @property
    def label(self) -> str:
        """Name of the results."""
        return self.name or self.dataset


@dataclass(frozen=True, kw_only=True)
class EvaluationResults:
    """All results of one evaluation; None for a task that was not requested."""

    subject: EvaluationSubject
    categories: CategoryTable
    num_images: int
    panoptic: PanopticQuality | None
    instance: AveragePrecision | None
    semantic: MeanIoU | None
    segments: SegmentErrors | None = None
    errors: ErrorCosts | None = None
    pixels: np.ndarray | None = None
    """[K truth, K predicted] int64: confusion matrix of the semantic task, in pixels."""
    extra: ExtraResults = field(default_factory=ExtraResults)
    notes: Sequence[str] = ()
    """Lines about the scored files for the page, such as the number of images without a result."""

    def metrics(self) -> dict[str, float | None]:
        """Return every metric of the set in per cent, with names that MLflow accepts; None if undefined."""
        values: dict[str, float | None] = {}
        if self.panoptic is not None:
            splits = (("", self.panoptic.all), ("_th", self.panoptic.things), ("_st", self.panoptic.stuff))
            for suffix, quality in splits:
                values |= {f"{name}{suffix}": value for name, value in _quality(quality).items()}
            values |= {f"PQ_{size}": _quality(quality)["PQ"] for size, quality in self.panoptic.by_size.items()}
        if self.instance is not None:
            values |= {name: percent(value) for name, value in self.instance.stats.items()}
        if self.semantic is not None:
            values |= _semantic(self.semantic)
        return values | self.extra.metrics()

    def headline(self, prefix: str = "val") -> dict[str, float]:
        """Return the defined metrics in per cent as `prefix/PQ`, `prefix/PQ_th`, `prefix/AP`, `prefix/mIoU` etc."""
        return {f"{prefix}/{name}": value for name, value in self.metrics().items() if value is not None}

    def per_class(self) -> list[dict[str, Any]]:
        """Return one row per category with the values of the requested tasks; None for undefined values."""
        only_things = self.panoptic is None and self.semantic is None
        labels = self.categories.labels("panoptic")
        thing_labels = self.categories.labels("instance")
        rows = []
        for category in self.categories.for_task("instance" if only_things else "panoptic"):
            label = labels[category.id]
            row: dict[str, Any] = {"id": category.id, "name": category.name, "is_thing": category.is_thing}
            if self.panoptic is not None:
                q = self.panoptic.per_class[label]
                shares = {"PQ": q.pq, "SQ": q.sq, "RQ": q.rq}
                row |= {name: 100 * value if q.occurs else None for name, value in shares.items()}
                row |= {"TP": q.true_positives, "FP": q.false_positives, "FN": q.false_negatives}
            if self.instance is not None:
                stats = self.instance.class_stats(thing_labels[category.id]) if category.is_thing else {}
                row |= {name: percent(stats.get(name, -1.0)) for name in self.instance.stats}
            if self.semantic is not None:
                row["IoU"] = percent(self.semantic.per_class[label])
                row["pixels"] = self.semantic.truth_pixels[label]
            rows.append(row | self.extra.class_values(category, label, thing_labels.get(category.id)))
        return rows

    def to_json(self) -> str:
        """Return the content of results.json."""
        content = {
            "unit": "per cent",
            **asdict(self.subject),
            "settings_digest": None if self.subject.settings is None else self.subject.settings.digest,
            "num_images": self.num_images,
            "metrics": self.metrics(),
            "num_classes_averaged": self._classes_averaged(),
            "per_class": self.per_class(),
        }
        return json.dumps(content, indent=1, allow_nan=False) + "\n"

    def _classes_averaged(self) -> dict[str, int]:
        """Return, for metrics that are means over classes, the number of these classes."""
        counts: dict[str, int] = {}
        if self.panoptic is not None:
            splits = {"PQ": self.panoptic.all, "PQ_th": self.panoptic.things, "PQ_st": self.panoptic.stuff}
            counts |= {name: quality.num_classes if quality else 0 for name, quality in splits.items()}
        if self.instance is not None:
            counts["AP"] = sum(value >= 0 for value in self.instance.per_class)
        if self.semantic is not None:
            counts["mIoU"] = sum(pixels > 0 for pixels in self.semantic.truth_pixels)
        return counts

    def table(self, per_class: bool = True) -> str:
        """Return the results as plain text, at most about 100 columns wide."""
        metrics = self.metrics()
        blocks = [self._title()]
        if self.panoptic is not None:
            counts = self._classes_averaged()
            rows = [
                [split, *(metrics[name + suffix] for name in ("PQ", "SQ", "RQ")), counts["PQ" + suffix]]
                for split, suffix in (("all", ""), ("things", "_th"), ("stuff", "_st"))
            ]
            blocks.append(columns(["panoptic", "PQ", "SQ", "RQ", "classes"], rows))
            if sizes := {f"PQ_{size}": metrics[f"PQ_{size}"] for size in self.panoptic.by_size}:
                blocks.append(columns(["by size", *sizes], [["", *sizes.values()]]))
        if self.instance is not None:
            names = list(self.instance.stats)
            blocks.append(columns(["mask AP", *names], [["", *(metrics[name] for name in names)]]))
        if self.semantic is not None:
            names = list(_semantic(self.semantic))
            blocks.append(columns(["semantic", *names], [["", *(metrics[name] for name in names)]]))
        blocks += [columns([g.title, *g.numbers], [["", *g.numbers.values()]]) for g in self.extra.groups()]
        if per_class:
            classes = self.per_class()
            details = self.instance.stats.keys() - {"AP"} if self.instance is not None else ()  # too wide here
            names = [name for name in classes[0] if name not in {"id", "name", "is_thing", *details}]
            rows = [
                [row["name"], "thing" if row["is_thing"] else "stuff", *(row[name] for name in names)]
                for row in classes
            ]
            blocks.append(columns(["class", "kind", *names], rows))
        return "\n\n".join(blocks) + "\n"

    def _title(self) -> str:
        subject = self.subject
        parts = [f"{subject.label}: {format_count(self.num_images, 'image')}"]
        if subject.subset is not None:
            parts.append(f"SUBSET ({subject.subset})")
        if subject.test_time is not None:
            parts.append(subject.test_time)
        if subject.step is not None:
            parts.append(f"checkpoint of step {subject.step}")
        title = ", ".join(parts) + (f"  [data {subject.fingerprint[:12]}]" if subject.fingerprint else "")
        return title if subject.classes is None else f"{title}\nSOME CLASSES: {subject.classes}"


def _quality(quality: Quality | None) -> dict[str, float | None]:
    if quality is None:
        return {"PQ": None, "SQ": None, "RQ": None}
    return {"PQ": 100 * quality.pq, "SQ": 100 * quality.sq, "RQ": 100 * quality.rq}


def _semantic(result: MeanIoU) -> dict[str, float | None]:
    return {
        "mIoU": percent(result.miou),
        "fwIoU": percent(result.fwiou),
        "mACC": percent(result.macc),
        "pACC": percent(result.pacc),
        "mIoU_occurring": percent(result.miou_occurring),
        "mIoU_all": percent(result.miou_all),
    }


def distinct_names(names: Iterable[str]) -> list[str]:
    """Return the names of classes as keys: the second class with a name gets ` (2)`, the third ` (3)`."""
    counts = Counter[str]()
    keys = []
    for name in names:
        counts[name] += 1
        keys.append(name if counts[name] == 1 else f"{name} ({counts[name]})")
    return keys


def columns(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """Return lines with aligned columns: text to the left, numbers to the right, `-` for None."""
    cells = [list(head), *([_cell(value) for value in row] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    is_text = [all(isinstance(row[i], str) for row in rows) for i in range(len(head))]
    lines = []
    for row in cells:
        aligned = [c.ljust(w) if text else c.rjust(w) for c, w, text in zip(row, widths, is_text, strict=True)]
        lines.append("  ".join(aligned).rstrip())
    lines.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join(lines)


def _cell(value: Any) -> str:
    match value:
        case None:
            return "-"
        case float():
            return f"{value:.2f}"
        case _:
            return str(value)
