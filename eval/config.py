"""Settings of evaluation (standard library only)."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Annotated, Any, Literal

from m2f.data_pipeline.categories import Task
from m2f.model.errors import ConfigError
from m2f.model.limits import FROM_0, FROM_1, PIXELS, SECONDS, Section

ExtraMetric = Literal["boundary", "box", "class_agnostic", "cityscapes"]
EXTRA_METRIC_TASKS: dict[ExtraMetric, tuple[Task, ...]] = {
    "boundary": ("panoptic", "instance"),
    "box": ("instance",),
    "class_agnostic": ("instance",),
    "cityscapes": ("instance", "semantic"),
}
"""Tasks whose predictions an extra metric judges."""


@dataclass(frozen=True, kw_only=True)
class WholeImage(Section):
    """One forward pass per image, resized by `shortest_edge` and `max_size` of the evaluation."""

    kind: Literal["whole"] = "whole"

    def describe(self) -> str | None:
        """Nothing to say: it is the usual way."""
        return None


@dataclass(frozen=True, kw_only=True)
class MultiScale(Section):
    """Class scores averaged over several sizes of the image: the papers' m.s. columns. Semantic task only."""

    kind: Literal["multi_scale"] = "multi_scale"
    shortest_edges: Annotated[tuple[int, ...], PIXELS] = (256, 384, 512, 640, 768, 896)
    """The shorter side at every size; officially 0.5, 0.75, 1, 1.25, 1.5 and 1.75 times that of one scale."""
    max_size: Annotated[int, PIXELS] = 3584
    """Longer side at most."""
    flip: bool = True
    """Every size also mirrored."""
    window: Annotated[int | None, PIXELS] = None
    """Side of overlapping windows that every size is cut into, whose class scores are averaged; None: in one pass."""
    stride: Annotated[int | None, PIXELS] = None
    """Pixels from one window to the next, the last of a row or column is moved back; None takes `window`."""

    def __post_init__(self) -> None:
        super().__post_init__()
        sizes = self.shortest_edges
        if not sizes or len(set(sizes)) < len(sizes):
            raise ConfigError(f"test_time.shortest_edges is {list(sizes)}; name at least one size, each once")
        if self.stride is not None and self.stride > (self.window or 0):
            raise ConfigError(
                f"test_time: windows of {self.window} pixels every {self.stride} leave gaps; let stride be at most "
                "window"
            )

    def describe(self) -> str | None:
        """For titles of results."""
        windows = "" if self.window is None else f", windows of {self.window} every {self.stride or self.window} pixels"
        return f"{len(self.shortest_edges)} scales{', flipped too' if self.flip else ''}{windows}"


@dataclass(frozen=True, kw_only=True)
class SlidingWindows(Section):
    """Overlapping windows, for images too large for one pass: class scores are averaged, segments joined across windows
    where they agree (docs/evaluation.md has the rule)."""

    kind: Literal["windows"] = "windows"
    size: Annotated[int, PIXELS] = 1024
    """Side of a window in pixels."""
    stride: Annotated[int, PIXELS] = 768
    """Pixels from one window to the next; the last of a row or column is moved back to end with the image."""
    shortest_edge: Annotated[int | None, PIXELS] = None
    """The image is brought to this shorter side before it is cut; None keeps its size."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.size < self.stride:
            raise ConfigError(
                f"test_time: windows of {self.size} pixels every {self.stride} leave gaps; let stride be at most size"
            )

    def describe(self) -> str | None:
        """For titles of results."""
        return f"windows of {self.size} every {self.stride} pixels"


TestTime = WholeImage | MultiScale | SlidingWindows
WHOLE_IMAGE = WholeImage()
_LATER = {"multi_scale": ("window", "stride")}


def stored_test_time(test_time: TestTime) -> dict[str, Any]:
    """As results store them: without settings that the first results lack, where they say nothing."""
    later = _LATER.get(test_time.kind, ())
    return {name: value for name, value in asdict(test_time).items() if value is not None or name not in later}


def check_test_time(test_time: TestTime, tasks: Collection[Task], place: str) -> None:
    """Raises ConfigError, which begins with `place`, for a test time that one of the tasks cannot have."""
    if set(tasks) <= {"semantic"}:
        return
    if isinstance(test_time, MultiScale):
        raise ConfigError(
            f"{place} has test_time.kind=multi_scale, which averages class scores of pixels, but the tasks "
            f"{list(tasks)}; give it `tasks: [semantic]`"
        )
    if isinstance(test_time, SlidingWindows) and test_time.size == test_time.stride:
        raise ConfigError(
            f"{place} has windows of test_time.size={test_time.size} every {test_time.stride} pixels, which do not "
            f"overlap, and the tasks {list(tasks)}: objects would be cut where windows meet; let stride be below size"
        )


@dataclass(frozen=True, kw_only=True)
class EvaluationSet(Section):
    """One named set that checkpoints are evaluated on."""

    dataset: str
    """Name under `datasets`."""
    name: str | None = None
    """What its results are called, in folders and in front of metrics; None takes the data set's name."""
    limit: Annotated[int | None, FROM_1] = None
    """Only the first images; the results are labelled as a subset."""
    tasks: tuple[Task, ...] | None = None
    """Tasks of this set; None takes `evaluation.tasks`."""
    test_time: TestTime | None = None
    """How its images go through the model; None takes `evaluation.test_time`."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.name is not None and not re.fullmatch(r"\w[\w.-]*", self.name):
            raise ConfigError(
                f"evaluation.sets.name is {self.name!r}; use letters, digits, '_', '-' and '.', as it names a folder"
            )

    @property
    def label(self) -> str:
        """What its results are called."""
        return self.name or self.dataset


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig(Section):
    """What is computed for every evaluated checkpoint, and by whom."""

    sets: tuple[EvaluationSet, ...] = ()
    """If a recipe does not name them: its data set `val`, `valid` or `validation`, if it has one. `[]`: none."""
    tasks: tuple[Task, ...] = ("panoptic",)
    """panoptic: PQ; instance: mask AP; semantic: mIoU. All from one forward pass. If a recipe does not name them: the
    task of the training, `data.task`."""
    test_time: TestTime = WHOLE_IMAGE
    """How an image goes through the model: in `m2f predict`, and in sets that do not say it themselves."""
    extra_metrics: tuple[ExtraMetric, ...] = ()
    """boundary: Boundary PQ and AP; box: AP of the boxes of instances; class_agnostic: recall of instances whatever
    their class; cityscapes: the AP, IoU and iIoU of that benchmark. Each for those of the tasks that it judges."""
    policy: Literal["every", "latest"] = "every"
    """Evaluate every committed checkpoint, or drop stale ones that still wait."""
    shortest_edge: Annotated[int, PIXELS] = 800
    """Shorter side of an image in the network, unless the longer one would exceed `max_size`."""
    max_size: Annotated[int, PIXELS] = 1333
    """Longer side of an image in the network at most."""
    shrink: Literal["area", "bilinear"] = "area"
    """How test images are resized: as `data.augment.shrink` says; `bilinear` is that of the official code."""
    batch_size: Annotated[int, FROM_1] = 1
    """Images per forward; fixed by the manifest's order, so results do not depend on the actors."""
    actors: Annotated[int, FROM_1] = 1
    """Processes that evaluate at the same time."""
    num_cpus_per_actor: Annotated[float, FROM_0] = 1.0
    """CPUs that Ray reserves for each of them."""
    num_gpus_per_actor: Annotated[float | Literal["auto"], FROM_0] = "auto"
    """GPUs that Ray reserves for each of them; a part such as 0.25 lets several share one, also with a training rank.
    `auto`: one where ranks leave some, else a share of a rank's; 0 without GPUs."""
    resources_per_actor: Annotated[Mapping[str, float], FROM_0] = field(default_factory=dict)
    """Custom Ray resources that each takes, for example `{evaluator: 1}`: it runs only on nodes that offer them."""
    threads: Annotated[int, FROM_1] = 1
    """Torch threads per actor on CPU."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Numbers in the forward pass of evaluations and of `m2f predict`. bf16: products and convolutions in bfloat16,
    with weights that are cast once; made for GPUs, and scores differ in their last digits. fp32: all digits."""
    cuda_graphs: bool = False
    """Replay the model on GPUs as one CUDA graph per size of image, from the third image of a size on: the same
    results, without the cost of launching a thousand kernels. Worth it for small images of few sizes."""
    hang_s: Annotated[float, SECONDS] = 1800.0
    """Seconds without an answer to a call of eight images, after which an actor is replaced."""
    panels: Annotated[int, FROM_0] = 8
    """Fixed images drawn per evaluation (image, truth, prediction), and half as many of the worst."""

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
        """GPUs of each actor; 0 while `auto` is not decided on."""
        return 0.0 if self.num_gpus_per_actor == "auto" else self.num_gpus_per_actor

    def for_set(self, evaluated: EvaluationSet) -> EvaluationConfig:
        """These settings with the set's own tasks and test time, and the extra metrics that judge them."""
        tasks = self.tasks if evaluated.tasks is None else evaluated.tasks
        judged = (metric for metric in self.extra_metrics if not set(tasks).isdisjoint(EXTRA_METRIC_TASKS[metric]))
        test_time = self.test_time if evaluated.test_time is None else evaluated.test_time
        return replace(self, sets=(evaluated,), tasks=tasks, test_time=test_time, extra_metrics=tuple(judged))

    def _check_sets(self) -> None:
        labels = [s.label for s in self.sets]
        for evaluated in self.sets:
            if labels.count(evaluated.label) > 1:
                raise ConfigError(f"evaluation.sets: two are called {evaluated.label!r}; give each a `name` of its own")
            tasks = evaluated.tasks if evaluated.tasks is not None else self.tasks
            test_time = self.test_time if evaluated.test_time is None else evaluated.test_time
            check_test_time(test_time, tasks, f"evaluation.sets: {evaluated.label!r}")

    def _check_extra_metrics(self) -> None:
        requested = {*self.tasks, *(task for s in self.sets for task in s.tasks or ())}
        for metric in self.extra_metrics:
            judged = EXTRA_METRIC_TASKS[metric]
            if requested.isdisjoint(judged):
                raise ConfigError(
                    f"evaluation.extra_metrics has {metric!r}, which judges {' and '.join(judged)}, but "
                    f"evaluation.tasks is {list(self.tasks)}; add one of these or remove the metric"
                )
