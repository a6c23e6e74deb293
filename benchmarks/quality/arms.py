"""What is compared: image sets, arms, and which pairs of arms are judged by which margin."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from m2f.cluster.recipe.config import RunConfig
from m2f.cluster.recipe.load import load_recipe

RECIPE = Path(__file__).with_name("shapes.yaml")
METRICS = ("PQ", "PQ_small", "PQ_medium", "PQ_large", "AP", "APs", "APm", "APl")
"""Of the validation set, in per cent; sizes are those of the truth, bounds 32 x 32 and 96 x 96 pixels."""


@dataclass(frozen=True)
class ImageSet:
    """Training and validation images, as overrides of the recipe."""

    name: str
    overrides: tuple[str, ...] = ()


@dataclass(frozen=True)
class Arm:
    """One way to train, as overrides of the recipe."""

    name: str
    overrides: tuple[str, ...] = ()


@dataclass(frozen=True)
class Comparison:
    """Two arms whose runs of the same seed are subtracted."""

    arm: str
    reference: str
    margin: float = 1.0
    """Points of a metric by which the arm may be worse and still has no loss."""


IMAGE_SETS = (
    ImageSet("shapes"),
    ImageSet(
        "small_shapes",
        tuple(
            f"datasets.{part}.source.{setting}"
            for part in ("train", "val")
            for setting in ("small_share=0.6", "small_diameters=[4, 12]")
        ),
    ),
)
"""`shapes`: the demo's, with overlapping objects, a quarter of them small. `small_shapes`: more than half of the
objects have diameters of 4 to 12 pixels."""

_MATCHING = "model.loss.matching_box_share=0.5"
_SUPERVISION = "model.loss.supervision_box_share=0.5"
ARMS = (
    Arm("base"),
    Arm("box_matching", (_MATCHING,)),
    Arm("box_points", (_MATCHING, _SUPERVISION)),
    Arm("uniform_8192", ("model.loss.num_points=8192",)),
)
"""All but the last have 1024 points."""

COMPARISONS = (
    Comparison("box_matching", "base"),
    Comparison("box_points", "base"),
    Comparison("uniform_8192", "base"),
    Comparison("box_points", "uniform_8192", margin=1.5),
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
        return load_recipe(RECIPE, [*self.image_set.overrides, *self.arm.overrides, *overrides, *own])


def runs_of(sets: Iterable[ImageSet], arms: Sequence[Arm], seeds: Sequence[int]) -> list[Run]:
    """All runs; those of one seed and set follow each other, so that pairs are complete early."""
    return [Run(image_set, arm, seed) for image_set in sets for seed in seeds for arm in arms]
