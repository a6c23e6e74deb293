"""Settings of data sets, sharding, augmentation and loading (standard library only)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal

from m2f.data_pipeline.categories import Task
from m2f.data_pipeline.source_parts import PartConfig, TileConfig
from m2f.data_pipeline.sources import CustomSource as CustomSource  # users' code imports it from here, too
from m2f.data_pipeline.sources import SourceConfig
from m2f.model.errors import ConfigError
from m2f.model.limits import (
    ABOVE_0,
    FROM_0,
    FROM_1,
    GIGABYTES,
    MEGABYTES,
    PART,
    PIXELS,
    SECONDS,
    SECONDS_FROM_0,
    STEPS,
    Section,
)


@dataclass(frozen=True, kw_only=True)
class StorageConfig(Section):
    """How `s3://` URLs are reached. Credentials come from the usual AWS chain and are never written in a recipe."""

    endpoint_url: str | None = None
    """S3-compatible endpoint; None takes AWS_ENDPOINT_URL, else AWS itself."""
    region: str | None = None
    """Region of the store; None takes that of the AWS settings of this machine."""
    patience_s: Annotated[float, SECONDS_FROM_0] = 600.0
    """A request that fails for a passing reason is repeated for so long, once the store has answered this run;
    before that for 20 s, as a wrong endpoint is a mistake."""
    read_timeout_s: Annotated[float, SECONDS] = 60.0
    """Without an answer or further bytes a request is repeated after so long."""


@dataclass(frozen=True, kw_only=True)
class DatasetConfig(Section):
    """One data set: where its shards live and, to make them, where it comes from."""

    shards: str
    """Folder or `s3://` prefix of the shards and their manifest."""
    source: SourceConfig | None = None
    """Raw data that `m2f shard` reads; None where the shards already exist."""
    shard_mb: Annotated[float, MEGABYTES] = 128.0
    """Target size of one shard in MB (10^6 bytes)."""
    seed: int = 0
    """Seed of the global permutation at shard time."""
    part: PartConfig | None = None
    """Take only the training or only the validation part of the source; None takes all images."""
    background: str | None = None
    """Name of a stuff class for all pixels without an object; makes a source of instances fit for semantic and panoptic
    training too."""
    tiles: TileConfig | None = None
    """Cut large images into tiles, each a sample of its own; None keeps images whole."""
    max_pixels: Annotated[int, PIXELS] = 178_956_970
    """Larger images are refused from their header, before decoding."""


@dataclass(frozen=True, kw_only=True)
class LargeScaleJitter(Section):
    """Flip, resize by a random scale, crop or pad to a square (COCO recipe)."""

    kind: Literal["lsj"] = "lsj"
    size: Annotated[int, PIXELS] = 1024
    """Side of the square that the network gets."""
    min_scale: Annotated[float, ABOVE_0] = 0.1
    """Smallest scale that is drawn: at scale 1 the longer side of an image is as long as the square."""
    max_scale: Annotated[float, ABOVE_0] = 2.0
    """Largest scale that is drawn; scales are uniform between the two."""
    shrink: Literal["area", "bilinear"] = "area"
    """`area`: bilinear, but averaging areas where an image shrinks. `bilinear`: Pillow's antialiased interpolation, the
    pixels of the official code; resizes the whole image before it is cropped, which takes longer."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.min_scale > self.max_scale:
            raise ConfigError(
                f"data.augment.min_scale is {self.min_scale:g}, above max_scale, which is {self.max_scale:g}"
            )


@dataclass(frozen=True, kw_only=True)
class ShortestEdgeCrop(Section):
    """Random shortest edge, random crop, colour jitter, flip, pad (ADE20K, Cityscapes, Mapillary recipe)."""

    kind: Literal["shortest_edge"] = "shortest_edge"
    shortest_edges: Annotated[tuple[int, ...], PIXELS]
    """Lengths of the shorter side, one of which is drawn for each image."""
    max_size: Annotated[int, PIXELS]
    """Longer side at most; the shorter one then gets below the length that was drawn."""
    crop: Annotated[tuple[int, int], PIXELS]
    """Height and width of the crop; smaller images are padded to it."""
    color: bool = True
    """Change brightness, contrast, saturation and hue at random."""
    shrink: Literal["area", "bilinear"] = "area"
    """How images are resized, see `shrink` of `lsj`."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_edges(self.shortest_edges, self.max_size)


@dataclass(frozen=True, kw_only=True)
class ScaleJitter(Section):
    """Flip and random shortest edge, without colours. Images keep their shape, and batches are padded to their largest.

    The defaults are Detectron2's standard augmentation for COCO, which large-scale jitter replaced.
    """

    kind: Literal["scale"] = "scale"
    shortest_edges: Annotated[tuple[int, ...], PIXELS] = (640, 672, 704, 736, 768, 800)
    """Lengths of the shorter side, one of which is drawn for each image."""
    max_size: Annotated[int, PIXELS] = 1333
    """Longer side at most; the shorter one then gets below the length that was drawn."""
    crop_first: Annotated[tuple[int, int] | None, PIXELS] = None
    """Of half of the images only a part is taken: resized to a shortest edge of 400, 500 or 600, the part's sides are
    drawn between these two. DETR and MaskFormer have [384, 600]."""
    shrink: Literal["area", "bilinear"] = "area"
    """How images are resized, see `shrink` of `lsj`."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_edges(self.shortest_edges, self.max_size)
        if self.crop_first is not None and self.crop_first[0] > self.crop_first[1]:
            raise ConfigError(f"data.augment.crop_first is {list(self.crop_first)}; give [smallest, largest] side")


def _check_edges(shortest_edges: tuple[int, ...], max_size: int) -> None:
    if not shortest_edges:
        raise ConfigError("data.augment.shortest_edges is empty; name at least one size")
    if max_size < min(shortest_edges):
        raise ConfigError(
            f"data.augment.max_size is {max_size}, below the smallest of shortest_edges, which is {min(shortest_edges)}"
        )


AugmentConfig = LargeScaleJitter | ShortestEdgeCrop | ScaleJitter
Shrink = Literal["area", "bilinear"]
CropPadding = Literal["mean", "grey"]
Rasterise = Literal["source", "crop"]


@dataclass(frozen=True, kw_only=True)
class CopyPasteConfig(Section):
    """Simple Copy-Paste: things of another image, augmented like this one, on top of it (CVPR 2021)."""

    probability: Annotated[float, PART] = 1.0
    """Share of the images that receive objects; each thing of the partner is pasted with probability 1/2."""


@dataclass(frozen=True, kw_only=True)
class MixtureItem(Section):
    """One data set of a training mixture."""

    dataset: str
    """Name under `datasets`."""
    weight: Annotated[float, ABOVE_0] = 1.0
    """Relative share of samples."""
    include: tuple[str, ...] = ()
    """Only images that show one of these classes (names; a crowd does not count); empty takes all."""
    exclude: tuple[str, ...] = ()
    """No image that shows one of these classes."""
    fraction: Annotated[float, PART] = 1.0
    """Share of the remaining images to use: the same ones in every run, and a smaller share lies within a larger."""
    limit: Annotated[int | None, FROM_1] = None
    """At most so many images, chosen in the same way."""
    repeat_threshold: Annotated[float | None, PART] = None
    """Show rare classes more often: in a share f of the images, sqrt(repeat_threshold / f) times (LVIS: 0.001)."""


@dataclass(frozen=True, kw_only=True)
class CacheConfig(Section):
    """Copies of what was read from the object store, on a disk of each machine and shared by its ranks."""

    folder: str
    """Folder on a local disk; may be shared by runs."""
    max_gb: Annotated[float, GIGABYTES]
    """Limit of its size (10^9 bytes). What is wanted last is given up first; a full disk only makes it smaller."""


@dataclass(frozen=True, kw_only=True)
class DataConfig(Section):
    """What training reads."""

    task: Task = "panoptic"
    """What the model learns: segments of all pixels, objects, or a class for every pixel."""
    train: tuple[MixtureItem, ...]
    """Data sets that are mixed for training, with their shares."""
    augment: AugmentConfig = field(default_factory=LargeScaleJitter)
    """How an image is changed at random and brought to the size that the network gets."""
    copy_paste: CopyPasteConfig | None = None
    """Paste objects of other images; needs an `augment` with a fixed size (`lsj` or `shortest_edge`)."""
    crop_padding: Literal["mean", "grey"] = "mean"
    """What the network sees where a crop is larger than its image: `mean`, 0 after normalisation; `grey`, 128 before
    it, as in the official code."""
    rasterise: Literal["source", "crop"] = "source"
    """Where the polygons of instances become pixels: at the size of the source, once, to be resized like the image; or
    at the size of the crop, as in the official code: smooth borders where small objects are enlarged, more time per
    image. For task instance."""
    drop_empty_targets: bool = True
    """Drop targets that the crop left without a pixel (the official panoptic mapper keeps them)."""
    skip_images_without_targets: bool = True
    """Leave images without any annotated segment out of the order."""
    workers: Annotated[int, FROM_0] = 2
    """Loader processes per rank; 0 = one thread in the training process."""
    prefetch_steps: Annotated[int, STEPS] = 2
    """Batches of so many steps are prepared ahead."""
    chunk_mb: Annotated[float, MEGABYTES] = 4.0
    """Size of one ranged read in MB."""
    lanes: Annotated[int, FROM_1] = 192
    """Independent chunk streams of the order. Ranks whose number divides it read nearly every chunk once, others
    several times: 192 suits 1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96 and 192; `m2f plan` says what others cost."""
    window: Annotated[int, FROM_1] = 32
    """Shuffle window of a lane in samples. All ranks together hold the files of about lanes x window samples."""
    cache: CacheConfig | None = None
    """Keep what was read from an object store on a local disk; None reads it again in every epoch."""
    max_bad_samples: Annotated[int, FROM_0] = 0
    """How many samples may stay damaged or unreadable before training stops. Each is reported, and the next good one of
    the order is shown at its position; 0 stops at the first."""
    accept_changes: bool = False
    """Let a run go on although its data sets, weights, filters, seed, chunk_mb, lanes or window have changed: the new
    order then begins at its start. Otherwise the run is refused."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.train:
            raise ConfigError("data.train is empty: name at least one data set, for example [{dataset: train}]")
        if self.rasterise == "crop" and self.task != "instance":
            raise ConfigError(
                f"data.rasterise is crop, which draws the polygons of instances, but data.task is {self.task}; set "
                "data.rasterise to source"
            )
        if self.copy_paste is not None and isinstance(self.augment, ScaleJitter):
            raise ConfigError(
                "data.copy_paste needs two images of one size, and data.augment.kind scale keeps their shapes; choose "
                "lsj or shortest_edge"
            )
