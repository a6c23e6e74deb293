"""What is compared: image sets, arms, and which pairs of arms are judged by which margin."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from m2f.cluster.recipe.config import RunConfig
from m2f.cluster.recipe.load import load_recipe

CONFIGS = Path(__file__).parents[2] / "configs"
METRICS = ("PQ", "PQ_small", "PQ_medium", "PQ_large", "AP", "APs", "APm", "APl", "mIoU")
"""Of the validation set, in per cent; sizes are those of the truth, bounds 32 x 32 and 96 x 96 pixels."""


@dataclass(frozen=True)
class ImageSet:
    """A recipe with its training and validation images, and overrides of it."""

    name: str
    recipe: Path
    seeds: int
    """With how many seeds arms are compared here; with fewer than five they are reported and not judged."""
    overrides: tuple[str, ...] = ()


@dataclass(frozen=True)
class Arm:
    """One way to train, as overrides of the recipe."""

    name: str
    overrides: tuple[str, ...] = ()
    trainer: Literal["m2f", "transformers"] = "m2f"
    """Whose network, losses and loop; the batches are those of our loader, the evaluation is ours."""


@dataclass(frozen=True)
class Comparison:
    """Two arms whose runs of the same seed are subtracted."""

    arm: str
    reference: str
    margin: float = 1.0
    """Points of a metric by which the arm may be worse and still has no loss."""


_SHAPES = Path(__file__).with_name("shapes.yaml")
_ONE_PROCESS = "cluster.num_workers=1"
JUDGED_SEEDS = 5
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
    ImageSet("camvid", CONFIGS / "camvid_semantic_lite0.yaml", 1, (_ONE_PROCESS, "training.micro_batch=8")),
)
"""`shapes`: the demo's, with overlapping objects, a quarter of them small. `small_shapes`: more than half of the
objects have diameters of 4 to 12 pixels. A micro-batch is a whole step, as the loss of `transformers` knows no other
normalisers. `nuclei` and `camvid` read their images below M2F_DATA."""

_FEW = "model.loss.num_points=1024"
_MATCHING = "model.loss.matching_box_share=0.5"
_SUPERVISION = "model.loss.supervision_box_share=0.5"
ARMS = (
    Arm("base", (_FEW,)),
    Arm("box_matching", (_FEW, _MATCHING)),
    Arm("box_points", (_FEW, _MATCHING, _SUPERVISION)),
    Arm("uniform_8192", ("model.loss.num_points=8192",)),
    Arm("transformers", (_FEW,), trainer="transformers"),
)
"""`transformers` is the peer of `base`: with the same start weights, images and optimizer."""
PILOT_ARMS = (
    Arm("base_2500", (_FEW, "training.max_steps=2500")),
    Arm("base_1250", (_FEW, "training.max_steps=1250")),
    Arm("pilots_1500", (_FEW, "training.max_steps=1500", "model.pilots.max_targets=100")),
)
"""Of other lengths than the recipe, for `shapes`; `base_1250` has half of the steps of `base_2500`."""
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
    """One arm on one image set with one seed."""

    image_set: ImageSet
    arm: Arm
    seed: int

    @property
    def name(self) -> str:
        """Of its run folder, log and CPU record."""
        return f"{self.image_set.name}-{self.arm.name}-{self.seed}"

    def config(self, folder: Path, overrides: Sequence[str] = ()) -> RunConfig:
        """Its recipe, with everything it writes below `folder`; `overrides` hold for all runs of a comparison."""
        places = [
            f"datasets.{part}.shards={folder / 'shards' / self.image_set.name / part}" for part in ("train", "val")
        ]
        own = [f"name={self.name}", f"output={folder / 'runs'}", f"seed={self.seed}", *places]
        return load_recipe(self.image_set.recipe, [*self.image_set.overrides, *self.arm.overrides, *overrides, *own])


def runs_of(sets: Iterable[ImageSet], arms: Sequence[Arm], seeds: Sequence[int]) -> list[Run]:
    """All runs; those of one seed and set follow each other, so that pairs are complete early."""
    return [Run(image_set, arm, seed) for image_set in sets for seed in seeds for arm in arms]
