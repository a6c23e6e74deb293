"""Annotated or predicted images in memory, and checks of their values.

`checked_panoptic` and `checked_instances` run where an image is read. They refuse values of another kind, such as texts
or fractions as class indices, which a conversion would silently change.
"""

from __future__ import annotations

import operator
from collections.abc import Collection, Mapping, Sequence, Set
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from m2f.data_pipeline.errors import DataError
from m2f.data_pipeline.readers.masks import read_rle
from m2f.data_pipeline.sample import VOID_ID
from m2f.eval.errors import EvaluationError
from m2f.eval.metrics.rle import Rle
from m2f.model.errors import UserError

if TYPE_CHECKING:
    import torch

MapLike: TypeAlias = "np.ndarray | torch.Tensor | Sequence[Sequence[int]]"
"""Map [H, W] as an array, a tensor on any device, or a list of rows."""


@dataclass(frozen=True, eq=False)
class PanopticImage:
    """Segments of one image, annotated or predicted. Raises EvaluationError for a map that is not an array."""

    id_map: np.ndarray
    """[H, W] integers, 0 for void."""
    labels: Mapping[int, int]
    """Class index of each segment id. Class indices start at 0. An entry for void is ignored."""
    crowds: Collection[int] = ()
    """Ids of annotated segments that are crowds."""
    areas: Mapping[int, float] = field(default_factory=dict)
    """Areas stated by the annotation, by segment id, above 0. Pixels are counted for segments without an entry."""

    if TYPE_CHECKING:  # the constructor accepts other types than the field has

        def __init__(
            self,
            id_map: MapLike,
            labels: Mapping[int, int],
            crowds: Collection[int] = (),
            areas: Mapping[int, float] = ...,
        ) -> None: ...

    def __post_init__(self) -> None:
        object.__setattr__(self, "id_map", to_array(self.id_map, "id_map"))


@dataclass(frozen=True, eq=False)
class Instances:
    """Instances of one image, annotated or detected. Raises EvaluationError for fields that are not arrays."""

    masks: np.ndarray | Sequence[np.ndarray] | Sequence[Rle]
    """[N, H, W] bool, or a list of masks [H, W] bool or of COCO's run-length encodings."""
    labels: np.ndarray | Sequence[int]
    """[N] class indices, which start at 0."""
    scores: np.ndarray | Sequence[float] | None = None
    """[N] scores of detections; None for annotations."""
    is_crowd: np.ndarray | Sequence[bool] | None = None
    """[N] crowd flags of annotations; None: no instance is a crowd."""
    areas: np.ndarray | Sequence[float] | None = None
    """[N] areas in pixels, stated by the annotation; None: the pixels of the masks are counted."""

    def __post_init__(self) -> None:
        if _has_tensors(self.masks):
            masks = [to_array(mask, "masks") if _is_tensor(mask) else mask for mask in self.masks]
            object.__setattr__(self, "masks", masks)
        for name in ("labels", "scores", "is_crowd", "areas"):
            if (values := getattr(self, name)) is not None:
                object.__setattr__(self, name, to_array(values, name))


def checked_panoptic(image: object, where: str, error: type[UserError] = EvaluationError) -> PanopticImage:
    """Return the image with Python numbers as ids, class indices and areas, and without entries for void.

    Raises `error` for an invalid field. The message begins with `where` and states the field and the value.
    """
    if not isinstance(image, PanopticImage):
        raise error(f"{where} is {image!r:.50}; it must be a PanopticImage")
    id_map, fields = image.id_map, _Fields(where, error)
    if id_map.dtype.kind not in "iub" or id_map.ndim != 2:
        raise error(f"{where} is a {id_map.dtype} map of shape {list(id_map.shape)}; it must be integers [H, W]")
    labels_by_id = fields.by_id("labels", image.labels)
    crowds = fields.ids("crowds", image.crowds)
    areas = fields.by_id("areas", image.areas)
    for name, ids in (("crowds", crowds), ("areas", areas)):
        if unknown := [i for i in ids if i not in labels_by_id]:
            raise error(f"{where}: {name} has the id {unknown[0]}, which labels does not have; use ids of segments")
    labels = {i: fields.label(label, f"segment {i}") for i, label in labels_by_id.items() if i != VOID_ID}
    stated = {i: fields.area(area, i, i in crowds) for i, area in areas.items() if i != VOID_ID}
    return replace(image, labels=labels, crowds=frozenset(crowds), areas=stated)


def checked_instances(image: object, where: str, error: type[UserError] = EvaluationError) -> Instances:
    """Return the instances with labels int64, scores and areas float64, and flags bool, each [N] or None.

    Masks are only counted. Raises `error` for an invalid field. The message begins with `where` and states the field
    and the value.
    """
    if not isinstance(image, Instances):
        raise error(f"{where} is {image!r:.50}; it must be Instances")
    masks, fields = image.masks, _Fields(where, error)
    has_length = hasattr(masks, "__len__") and getattr(masks, "ndim", 1) > 0  # an array of shape [] has no length
    if not has_length or isinstance(masks, str | bytes | Mapping | Set):
        raise error(f"{where}: masks is {masks!r:.50}; give an array [N, H, W] or a list of masks")
    if isinstance(masks, np.ndarray) and masks.size and masks.dtype != object and masks.ndim != 3:
        raise error(f"{where}: masks is {masks.dtype} of shape {list(masks.shape)}; it must be [N, H, W]")
    labels = fields.column("labels", image.labels, len(masks))
    with np.errstate(invalid="ignore"):  # NaN and infinity are refused below
        whole_labels = labels.astype(np.int64)
    if labels.dtype.kind == "f":
        fields.refuse("labels", labels, whole_labels != labels, "whole numbers")
    scores, crowd, areas = (
        None if values is None else fields.column(name, values, len(masks))
        for name, values in (("scores", image.scores), ("is_crowd", image.is_crowd), ("areas", image.areas))
    )
    if crowd is not None:
        fields.refuse("is_crowd", crowd, (crowd != 0) & (crowd != 1), "0, 1, True or False")
    if areas is not None:
        fields.refuse("areas", areas, ~(np.isfinite(areas) & (areas >= 0)), "numbers of pixels, or no areas")
    return replace(
        image,
        labels=whole_labels,
        scores=None if scores is None else scores.astype(np.float64),
        is_crowd=None if crowd is None else crowd.astype(bool),
        areas=None if areas is None else areas.astype(np.float64),
    )


@dataclass(frozen=True)
class _Fields:
    """Reads the fields of one image. All methods raise `error` with a message that begins with `where`."""

    where: str
    error: type[UserError]

    def by_id(self, name: str, values: object) -> dict[int, Any]:
        """Return a mapping whose keys are segment ids, with the ids as int."""
        if not isinstance(values, Mapping):
            raise self.error(f"{self.where}: {name} is {values!r:.50}; give a mapping from segment ids")
        return dict(zip(self.ids(name, values.keys()), values.values(), strict=True))

    def ids(self, name: str, values: object) -> list[int]:
        """Return segment ids as int. Flags are refused, because True would be the id 1."""
        listed = values.tolist() if hasattr(values, "tolist") else values
        if not isinstance(listed, Collection) or isinstance(listed, str | bytes | Mapping):
            raise self.error(f"{self.where}: {name} is {values!r:.50}; give a list of segment ids")
        numbers = [None if isinstance(value, bool | np.bool_) else _whole_number(value) for value in listed]
        if None in numbers:
            wrong = list(listed)[numbers.index(None)]
            raise self.error(f"{self.where}: {name} has {wrong!r:.50}, which is not a segment id; ids are integers")
        return [number for number in numbers if number is not None]

    def label(self, value: object, owner: str) -> int:
        """Return the class index of a segment."""
        number = _whole_number(value)
        if number is None:
            raise self.error(f"{self.where}: labels has {value!r:.50} for {owner}; give whole numbers")
        return number

    def area(self, value: object, segment_id: int, is_crowd: bool) -> float:
        """Return a stated area in pixels. It must be above 0, unless it is that of a crowd."""
        number = _plain(value)
        try:
            area = float(number) if isinstance(number, int | float) and not isinstance(number, bool) else None
        except OverflowError:
            area = None
        if area is None or not (is_crowd or 0 < area < float("inf")):
            raise self.error(
                f"{self.where}: areas states {number!r:.50} for segment {segment_id}; give its number of pixels, or no "
                "entry"
            )
        return area

    def column(self, name: str, values: object, count: int) -> np.ndarray:
        """Return an array of numbers, one for each of the `count` masks."""
        array = np.asarray(values)
        if array.ndim != 1 or (array.size and array.dtype.kind not in "biuf"):
            raise self.error(f"{self.where}: {name} is {array.tolist()!r:.50}; give one number per mask")
        if len(array) != count:
            raise self.error(f"{self.where}: {name} has {len(array)} entries for {count} masks")
        return array

    def refuse(self, name: str, values: np.ndarray, is_wrong: np.ndarray, remedy: str) -> None:
        """Raise the error for the first wrong value."""
        for i in is_wrong.nonzero()[0]:
            raise self.error(f"{self.where}: {name} has {values[i].item()} for mask {i}; give {remedy}")


def _plain(value: Any) -> object:
    """Return the Python number of a number of NumPy or torch, and any other value as it is."""
    return value.item() if getattr(value, "ndim", None) == 0 else value


def _whole_number(value: object) -> int | None:
    """Return a whole number as int, also if it is stored as float; None for any other value."""
    number = _plain(value)
    is_whole = isinstance(number, int) or (isinstance(number, float) and number.is_integer())
    return int(number) if is_whole else None


def to_array(values: Any, name: str) -> np.ndarray:
    """Convert an array, a tensor on any device or a list to an array. Raises EvaluationError for other values."""
    try:
        if _is_tensor(values):
            values = values.detach().cpu()
            return (values.double() if values.is_floating_point() else values).numpy()  # numpy has no bfloat16
        return np.asarray([to_array(value, name) for value in values] if _has_tensors(values) else values)
    except (TypeError, ValueError) as error:
        raise EvaluationError(f"{name} is not an array of numbers ({error})") from error


def _is_tensor(values: object) -> bool:
    return hasattr(values, "detach")


def _has_tensors(values: object) -> bool:
    return _is_tensor(values) or (isinstance(values, list | tuple) and any(map(_is_tensor, values)))


def compressed_rle(mask: Rle, name: str) -> Rle:
    """Return run lengths in compressed form, which is COCO's form for pycocotools.

    Raises DataError beginning with `name` for another form, and for `counts` that are damaged or do not fill the size.
    """
    if not isinstance(mask, Mapping) or not {"counts", "size"} <= mask.keys():
        raise DataError(
            f"{name} is {mask!r:.50}; it must be bool [H, W], or COCO's run lengths with `size` and `counts`"
        )
    counts = mask["counts"]
    try:
        height, width = map(operator.index, mask["size"])
    except (TypeError, ValueError):
        height = width = 0
    if min(height, width) < 1:
        raise DataError(f"{name} has the size {mask['size']!r:.50}; give its height and width in pixels")
    text = counts.decode("ascii", "replace") if isinstance(counts, bytes) else counts
    return read_rle({"size": [height, width], "counts": text}, height, width, name)
