"""Image sets, arms, and the pairs of arms that are compared."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from m2f.cluster.recipe.config import RunConfig
from m2f.cluster.recipe.load import load_recipe

CONFIGS = Path(__file__).parents[2] / "configs"
METRICS = ("PQ", "PQ_small", "PQ_medium", "PQ_large", "AP", "APs", "APm", "APl", "mIoU")
"""Metrics on the validation set, in per cent. Ground-truth areas of 32 x 32 and 96 x 96 pixels separate the sizes."""


@dataclass(frozen=True)
class ImageSet:
    """A recipe with training and validation images, and overrides of it."""

    name: str
    recipe: Path
    seeds: int
    """Number of seeds per arm. With fewer than five, arms are reported without a verdict."""
    overrides: tuple[str, ...] = ()


@dataclass(frozen=True)
class Arm:
    """A training variant, as overrides of the recipe."""

    name: str
    overrides: tuple[str, ...] = ()
    trainer: Literal["m2f", "transformers"] = "m2f"
    """Whose network, losses and training loop are used. Both use our loader and our evaluation."""


@dataclass(frozen=True)
class Comparison:
    """Two arms. Their difference is computed between runs with the same seed."""

    arm: str
    reference: str
    margin: float = 1.0
    """Number of metric points by which the arm may be worse and still count as `no loss`."""


_SHAPES = Path(__file__).with_name("shapes.yaml")
_ONE_PROCESS = "cluster.num_workers=1"
JUDGED_SEEDS = 5
"""Seeds per arm of the synthetic sets. More narrow the interval and cost as many runs."""
IMAGE_SETS = (
    ImageSet("shapes", _SHAPES, JUDGED_SEEDS),
    ImageSet(
        "small_shapes",
        _SHAPES,
        JUDGED_SEEDS,
        tuple(
            f"datasets.{part}.source.{setting}"
            for part in ("train", "val")
            for setting in ("small_share=0.6", "small_diameters=[4, 12]")
        ),
    ),
    ImageSet("nuclei", CONFIGS / "nuclei_panoptic_lite0.yaml", 2, (_ONE_PROCESS, "training.micro_batch=8")),
    ImageSet("camvid", CONFIGS / "camvid_semantic_lite0.yaml", 1, (_ONE_PROCESS, "training.micro_batch=4")),
)
"""`shapes` is the demo's set, with overlapping objects, a quarter of them small. In `small_shapes`, more than half of
the objects have diameters of 4 to 12 pixels. A micro-batch is a whole step, because the loss of `transformers` has only
per-batch normalisers. `nuclei` and `camvid` read images below M2F_DATA."""

_POINTS_1024 = "model.loss.num_points=1024"
_BOX_MATCHING = "model.loss.matching_box_share=0.5"
_BOX_SUPERVISION = "model.loss.supervision_box_share=0.5"
ARMS = (
    Arm("base", (_POINTS_1024,)),
    Arm("box_matching", (_POINTS_1024, _BOX_MATCHING)),
    Arm("box_points", (_POINTS_1024, _BOX_MATCHING, _BOX_SUPERVISION)),
    Arm("uniform_8192", ("model.loss.num_points=8192",)),
    Arm("transformers", (_POINTS_1024,), trainer="transformers"),
)
"""`transformers` is the peer of `base`, with the same initial weights, images and optimizer."""
PILOT_ARMS = (
    Arm("base_2500", (_POINTS_1024, "training.max_steps=2500")),
    Arm("base_1250", (_POINTS_1024, "training.max_steps=1250")),
    Arm("pilots_1500", (_POINTS_1024, "training.max_steps=1500", "model.pilots.max_targets=100")),
)
"""Arms for `shapes` that set their number of steps: `base_1250` has half the steps of `base_2500`."""
ALL_ARMS = ARMS + PILOT_ARMS

COMPARISONS = (
    Comparison("box_matching", "base"),
    Comparison("box_points", "base"),
    Comparison("uniform_8192", "base"),
    Comparison("box_matching", "uniform_8192", margin=1.5),
    Comparison("box_points", "uniform_8192", margin=1.5),
    Comparison("base", "transformers"),
    Comparison("pilots_1500", "base_2500"),
    Comparison("pilots_1500", "base"),
    Comparison("base_1250", "base_2500"),
)


@dataclass(frozen=True)
class Run:
    """One training run: an arm, an image set and a seed."""

    image_set: ImageSet
    arm: Arm
    seed: int

    @property
    def name(self) -> str:
        """Name of the run folder, log and CPU record."""
        return f"{self.image_set.name}-{self.arm.name}-{self.seed}"

    def config(self, folder: Path, overrides: Sequence[str] = ()) -> RunConfig:
        """Return the run's recipe, which writes only below `folder`. `overrides` apply to all runs of a comparison."""
        shard_paths = [
            f"datasets.{part}.shards={folder / 'shards' / self.image_set.name / part}" for part in ("train", "val")
        ]
        run_settings = [f"name={self.name}", f"output={folder / 'runs'}", f"seed={self.seed}", *shard_paths]
        return load_recipe(
            self.image_set.recipe, [*self.image_set.overrides, *self.arm.overrides, *overrides, *run_settings]
        )


def list_runs(sets: Iterable[ImageSet], arms: Sequence[Arm], seeds: Sequence[int]) -> list[Run]:
    """Return all runs. Those of one set and seed are consecutive, so that pairs are complete early."""
    return [Run(image_set, arm, seed) for image_set in sets for seed in seeds for arm in arms]
