"""Settings of evaluation (standard library only)."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Annotated, Any, Literal

from m2f.data_pipeline.categories import Task
from m2f.model.errors import ConfigError
from m2f.model.limits import FROM_0, FROM_1, PIXELS, SECONDS, Section

Placement = Literal["stride", "even"]


@dataclass(frozen=True)
class ExtraMetricEntry:
    """One extra metric, described without an import of its code."""

    module: str
    """Module with the metric's `TASK_METRICS`, see `m2f.eval.metrics.extra.task_metric`."""
    tasks: tuple[Task, ...]
    """Tasks to which the metric applies."""


EXTRA_METRICS = {
    "boundary": ExtraMetricEntry("m2f.eval.metrics.extra.boundary", ("panoptic", "instance")),
    "box": ExtraMetricEntry("m2f.eval.metrics.extra.box", ("instance",)),
    "class_agnostic": ExtraMetricEntry("m2f.eval.metrics.extra.class_agnostic", ("instance",)),
    "cityscapes": ExtraMetricEntry("m2f.eval.metrics.extra.cityscapes", ("instance", "semantic")),
}
"""Extra metrics by name. Recipes, states, results and evaluation follow from this table."""

if TYPE_CHECKING:
    ExtraMetric = str
else:
    ExtraMetric = Literal[tuple(EXTRA_METRICS)]  # recipes are checked against this type


@dataclass(frozen=True, kw_only=True)
class WholeImage(Section):
    """One forward pass per image, resized according to `evaluation.shortest_edge` and `evaluation.max_size`."""

    kind: Literal["whole"] = "whole"
    square: bool = False
    """Pad images to squares, on the right or below, as training with square crops does. Tokens of a plain vision
    transformer then have the same positions as in training. False pads to multiples of 32 pixels."""

    def describe(self) -> str | None:
        """Return a description for titles of results; None for the default."""
        return "padded to squares" if self.square else None


@dataclass(frozen=True, kw_only=True)
class MultiScale(Section):
    """Class scores summed over several image sizes (the papers' m.s. columns). Semantic task only."""

    kind: Literal["multi_scale"] = "multi_scale"
    shortest_edges: Annotated[tuple[int, ...], PIXELS] = (256, 384, 512, 640, 768, 896)
    """Lengths of the shorter side in pixels, one per size. The official sizes are 0.5, 0.75, 1, 1.25, 1.5 and 1.75
    times that of single-scale evaluation."""
    max_size: Annotated[int, PIXELS] = 3584
    """Largest length of the longer side in pixels."""
    flip: bool = True
    """Also evaluate every size mirrored."""
    window: Annotated[int | None, PIXELS] = None
    """Side length in pixels of windows into which every size is cut. Class scores are averaged if windows overlap.
    None: one pass per size."""
    stride: Annotated[int | None, PIXELS] = None
    """Distance between windows in pixels. The last one of a row or column is moved back to fit. None: the value of
    `window`."""

    def __post_init__(self) -> None:
        super().__post_init__()
        sizes = self.shortest_edges
        if not sizes or len(set(sizes)) < len(sizes):
            raise ConfigError(f"test_time.shortest_edges is {list(sizes)}; list at least one size, without duplicates")
        if self.stride is not None and self.window is None:
            raise ConfigError(
                f"test_time.stride is {self.stride} pixels, but test_time.window is not set; set window to the side "
                "length of the windows, or remove stride"
            )
        if self.stride is not None and self.window is not None and self.stride > self.window:
            raise ConfigError(
                f"test_time: window is {self.window} pixels and stride is {self.stride}, which leaves gaps; "
                "set stride to at most window"
            )

    def describe(self) -> str | None:
        """Return a description for titles of results."""
        windows = "" if self.window is None else f", windows of {self.window} every {self.stride or self.window} pixels"
        return f"{len(self.shortest_edges)} scales{', flipped too' if self.flip else ''}{windows}"


@dataclass(frozen=True, kw_only=True)
class SlidingWindows(Section):
    """Overlapping windows, for images too large for one pass.

    Class scores are averaged. Segments that agree in the overlap of windows are joined (rule in docs/evaluation.md).
    """

    kind: Literal["windows"] = "windows"
    size: Annotated[int, PIXELS] = 1024
    """Side length of a window in pixels."""
    stride: Annotated[int, PIXELS] = 768
    """Largest distance between windows in pixels."""
    placement: Placement = "stride"
    """Positions of the windows in a row or column; the last one always ends with the image. `stride`: every `stride`
    pixels, and the last window is moved back. `even`: as few windows as `stride` allows, spread evenly."""
    shortest_edge: Annotated[int | None, PIXELS] = None
    """Length in pixels to which the image's shorter side is resized before the image is cut; None: keep the size."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.size < self.stride:
            raise ConfigError(
                f"test_time: size is {self.size} pixels and stride is {self.stride}, which leaves gaps; "
                "set stride to at most size"
            )

    def describe(self) -> str | None:
        """Return a description for titles of results."""
        if self.placement == "even":
            return f"windows of {self.size} at most every {self.stride} pixels, spread evenly"
        return f"windows of {self.size} every {self.stride} pixels"


TestTime = WholeImage | MultiScale | SlidingWindows
WHOLE_IMAGE = WholeImage()
_ADDED_LATER: dict[str, dict[str, Any]] = {
    "whole": {"square": False},
    "multi_scale": {"window": None, "stride": None},
    "windows": {"placement": "stride"},
}
"""Settings that were added after the first version, with the values that it used."""


def stored_test_time(test_time: TestTime) -> dict[str, Any]:
    """Return the settings in the form that is stored with results.

    Settings that were added after the first version are left out if they have the value that it used, so digests of
    older results stay valid.
    """
    added_later = _ADDED_LATER[test_time.kind]
    return {n: value for n, value in asdict(test_time).items() if n not in added_later or value != added_later[n]}


def check_test_time(test_time: TestTime, tasks: Collection[Task], place: str) -> None:
    """Raise ConfigError if one of the tasks does not support `test_time`. The message starts with `place`."""
    if set(tasks) <= {"semantic"}:
        return
    if isinstance(test_time, MultiScale):
        raise ConfigError(
            f"{place} has test_time.kind=multi_scale, which sums class scores of pixels and supports only the "
            f"semantic task, but the tasks are {list(tasks)}; set `tasks: [semantic]`"
        )
    if isinstance(test_time, SlidingWindows) and test_time.size == test_time.stride:
        raise ConfigError(
            f"{place} has test_time.size={test_time.size} and a stride of {test_time.stride} pixels, so windows do not "
            f"overlap and the tasks {list(tasks)} would cut objects at window borders; set stride below size"
        )


@dataclass(frozen=True, kw_only=True)
class EvaluationSet(Section):
    """One named image set on which checkpoints are evaluated."""

    dataset: str
    """Name of the data set under `datasets`."""
    name: str | None = None
    """Name of the set's results, used in folder names and as a prefix of metrics; None: the name of the data set."""
    limit: Annotated[int | None, FROM_1] = None
    """Number of images to evaluate, taken from the start of the set. The results are labelled as a subset. None: all
    images."""
    tasks: tuple[Task, ...] | None = None
    """Tasks evaluated on this set; None: `evaluation.tasks`."""
    test_time: TestTime | None = None
    """How the model processes images of this set; None: `evaluation.test_time`."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.name is not None and not re.fullmatch(r"\w[\w.-]*", self.name):
            raise ConfigError(
                f"evaluation.sets.name is {self.name!r}; use letters, digits, '_', '-' and '.' (it is a folder name)"
            )

    @property
    def label(self) -> str:
        """Name of the results."""
        return self.name or self.dataset


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig(Section):
    """What is computed for every evaluated checkpoint, and with which resources."""

    sets: tuple[EvaluationSet, ...] = ()
    """Image sets to evaluate. Default: the recipe's data set `val`, `valid` or `validation`, if any. `[]`: none."""
    tasks: tuple[Task, ...] = ("panoptic",)
    """panoptic: PQ; instance: mask AP; semantic: mIoU. All of them use one forward pass. Default in a recipe: the task
    of the training, `data.task`."""
    test_time: TestTime = WHOLE_IMAGE
    """How the model processes an image, in `m2f predict` and in sets without a `test_time` of their own."""
    extra_metrics: tuple[ExtraMetric, ...] = ()
    """boundary: Boundary PQ and AP; box: AP of the instances' boxes; class_agnostic: recall of instances regardless of
    class; cityscapes: AP, IoU and iIoU of the Cityscapes benchmark. Each is computed for those tasks that it applies
    to."""
    policy: Literal["every", "latest"] = "every"
    """every: evaluate every committed checkpoint; latest: drop a waiting checkpoint when a newer one is committed."""
    shortest_edge: Annotated[int, PIXELS] = 800
    """Length in pixels of an image's shorter side in the network, unless the longer one would exceed `max_size`."""
    max_size: Annotated[int, PIXELS] = 1333
    """Largest length in pixels of an image's longer side in the network."""
    shrink: Literal["area", "bilinear"] = "area"
    """Interpolation for resizing test images, see `data.augment.shrink`; `bilinear` is that of the official code."""
    batch_size: Annotated[int, FROM_1] = 1
    """Images per forward pass. Batches follow the order of the manifest, so results do not depend on the number of
    actors."""
    actors: Annotated[int, FROM_1] = 1
    """Number of processes that evaluate in parallel."""
    num_cpus_per_actor: Annotated[float, FROM_0] = 1.0
    """CPUs that Ray reserves per actor."""
    num_gpus_per_actor: Annotated[float | Literal["auto"], FROM_0] = "auto"
    """GPUs that Ray reserves per actor. A fraction such as 0.25 lets several actors share a GPU, also with a training
    rank. auto: a GPU that training leaves free, else a share of a rank's GPU; 0 without GPUs."""
    resources_per_actor: Annotated[Mapping[str, float], FROM_0] = field(default_factory=dict)
    """Custom Ray resources per actor, such as `{evaluator: 1}`; actors run only on nodes that offer them."""
    threads: Annotated[int, FROM_1] = 1
    """Torch threads per actor on CPUs."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Numeric precision of the forward pass in evaluations and in `m2f predict`. bf16: products and convolutions in
    bfloat16 with weights cast once; intended for GPUs, and scores differ slightly. fp32: full precision."""
    cuda_graphs: bool = True
    """On GPUs, replay the model as one CUDA graph per image size, starting with the third image of a size. This saves
    about a thousand kernel launches per image. Each graph must first reproduce the normal predictions; otherwise the
    model runs without graphs, with a warning. Graphs take memory; set false if the GPU lacks it."""
    hang_s: Annotated[float, SECONDS] = 1800.0
    """Seconds without an answer to a call of eight images after which an actor is presumed hung and replaced."""
    panels: Annotated[int, FROM_0] = 8
    """Number of fixed images that every evaluation draws as panels (image, truth, prediction). Half as many of the
    worst images are drawn in addition."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.max_size < self.shortest_edge:
            raise ConfigError(
                f"evaluation.max_size is {self.max_size}, below evaluation.shortest_edge, which is {self.shortest_edge}"
            )
        self._check_sets()
        self._check_extra_metrics()

    @property
    def gpus_per_actor(self) -> float:
        """GPUs per actor; 0 as long as `auto` is not resolved."""
        return 0.0 if self.num_gpus_per_actor == "auto" else self.num_gpus_per_actor

    @property
    def pads_to_squares(self) -> bool:
        """Whether whole images are padded to squares."""
        return isinstance(self.test_time, WholeImage) and self.test_time.square

    def for_set(self, image_set: EvaluationSet) -> EvaluationConfig:
        """Return the settings of one set: its own tasks and test time, if stated, and only applicable extra metrics."""
        tasks = self.tasks if image_set.tasks is None else image_set.tasks
        applicable = (m for m in self.extra_metrics if not set(tasks).isdisjoint(EXTRA_METRICS[m].tasks))
        test_time = self.test_time if image_set.test_time is None else image_set.test_time
        return replace(self, sets=(image_set,), tasks=tasks, test_time=test_time, extra_metrics=tuple(applicable))

    def _check_sets(self) -> None:
        labels = [s.label for s in self.sets]
        for image_set in self.sets:
            if labels.count(image_set.label) > 1:
                raise ConfigError(f"evaluation.sets: two sets are named {image_set.label!r}; give each a unique `name`")
            tasks = image_set.tasks if image_set.tasks is not None else self.tasks
            test_time = self.test_time if image_set.test_time is None else image_set.test_time
            check_test_time(test_time, tasks, f"evaluation.sets: {image_set.label!r}")

    def _check_extra_metrics(self) -> None:
        set_tasks = [task for s in self.sets for task in s.tasks or ()]
        requested = dict.fromkeys([*self.tasks, *set_tasks])
        place = "evaluation.tasks and the tasks of evaluation.sets" if set_tasks else "evaluation.tasks"
        for metric in self.extra_metrics:
            applicable_tasks = EXTRA_METRICS[metric].tasks
            if requested.keys().isdisjoint(applicable_tasks):
                raise ConfigError(
                    f"evaluation.extra_metrics has {metric!r}, which applies to {' and '.join(applicable_tasks)}, but "
                    f"the tasks are {list(requested)} ({place}); add {' or '.join(applicable_tasks)} to the tasks, or "
                    "remove the metric"
                )
