"""Settings of data sets, sharding, augmentation and loading (standard library only)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal

from m2f.data_pipeline.categories import Task
from m2f.data_pipeline.source_parts import PartConfig, TileConfig
from m2f.data_pipeline.sources import CustomSource as CustomSource  # re-exported: users' code imports it from here
from m2f.data_pipeline.sources import SourceConfig
from m2f.model.errors import ConfigError
from m2f.model.limits import (
    ABOVE_0,
    FROM_0,
    FROM_1,
    GIGABYTES,
    MEGABYTES,
    PIXELS,
    SECONDS,
    SECONDS_FROM_0,
    SHARE_ABOVE_0,
    STEPS,
    Section,
)


@dataclass(frozen=True, kw_only=True)
class StorageConfig(Section):
    """Access to `s3://` URLs. Credentials come from the standard AWS credential chain, never from a recipe."""

    endpoint_url: str | None = None
    """URL of an S3-compatible endpoint. None uses AWS_ENDPOINT_URL if that is set, otherwise AWS."""
    region: str | None = None
    """Region of the store. None uses the region in this machine's AWS settings."""
    patience_s: Annotated[float, SECONDS_FROM_0] = 600.0
    """Seconds to retry a request after a transient error. Until the store has answered once in this run, retries stop
    after 20 s, because the endpoint is probably wrong."""
    read_timeout_s: Annotated[float, SECONDS] = 60.0
    """Seconds to wait for a response or for more bytes before a request is retried."""


@dataclass(frozen=True, kw_only=True)
class DatasetConfig(Section):
    """One data set: the location of its shards and, optionally, the raw data that they are made from."""

    shards: str
    """Folder or `s3://` prefix that holds the shards and their manifest."""
    source: SourceConfig | None = None
    """Raw data that `m2f shard` reads. None if the shards already exist."""
    shard_mb: Annotated[float, MEGABYTES] = 128.0
    """Target size of one shard in MB (10^6 bytes)."""
    seed: Annotated[int, FROM_0] = 0
    """Seed of the permutation of all samples when shards are written."""
    part: PartConfig | None = None
    """Use only the training part or only the validation part of the source. None uses all images."""
    background: str | None = None
    """Name of a stuff class that is given to all pixels without an object. It makes an instance data set usable for
    semantic and panoptic training. None adds no class."""
    tiles: TileConfig | None = None
    """Cut large images into tiles, each of which becomes a sample. None keeps images whole."""
    max_pixels: Annotated[int, PIXELS] = 178_956_970
    """Largest image size, height x width in pixels. Larger images are refused by their header, before decoding."""


@dataclass(frozen=True, kw_only=True)
class LargeScaleJitter(Section):
    """Random flip, resize by a random scale, and crop or pad to a square (the COCO recipe)."""

    kind: Literal["lsj"] = "lsj"
    size: Annotated[int, PIXELS] = 1024
    """Side of the square input of the network, in pixels."""
    min_scale: Annotated[float, ABOVE_0] = 0.1
    """Smallest random scale. At scale 1 the longer side of the image equals the side of the square."""
    max_scale: Annotated[float, ABOVE_0] = 2.0
    """Largest random scale. Scales are drawn uniformly between `min_scale` and `max_scale`."""
    color: bool = False
    """Apply random changes of brightness, contrast, saturation and hue; see `color` of `shortest_edge`."""
    shrink: Literal["area", "bilinear"] = "area"
    """Interpolation for resizing. `area`: area averaging if the image shrinks, otherwise bilinear. `bilinear`: Pillow's
    antialiased interpolation, equal to the official code pixel for pixel. It resizes the whole image before the crop,
    which is slower."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.min_scale > self.max_scale:
            raise ConfigError(
                f"data.augment.min_scale is {self.min_scale:g}, above max_scale, which is {self.max_scale:g}"
            )


@dataclass(frozen=True, kw_only=True)
class ShortestEdgeCrop(Section):
    """Random shortest edge, random crop, colour jitter, flip and padding (ADE20K, Cityscapes and Mapillary recipe)."""

    kind: Literal["shortest_edge"] = "shortest_edge"
    shortest_edges: Annotated[tuple[int, ...], PIXELS]
    """Lengths of the shorter side after resizing, in pixels. One is drawn at random for each image."""
    max_size: Annotated[int, PIXELS]
    """Upper limit of the longer side in pixels. If it applies, the shorter side is shorter than the length drawn."""
    crop: Annotated[tuple[int, int], PIXELS]
    """Height and width of the crop in pixels. Smaller images are padded to this size."""
    color: bool = True
    """Apply random changes of brightness, contrast, saturation and hue."""
    shrink: Literal["area", "bilinear"] = "area"
    """Interpolation for resizing; see `shrink` of `lsj`."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_edges(self.shortest_edges, self.max_size)


@dataclass(frozen=True, kw_only=True)
class ScaleJitter(Section):
    """Random flip and random shortest edge, without colour jitter.

    Images keep their aspect ratio, and each batch is padded to its largest image. The defaults are Detectron2's
    standard COCO augmentation, which predates large-scale jitter.
    """

    kind: Literal["scale"] = "scale"
    shortest_edges: Annotated[tuple[int, ...], PIXELS] = (640, 672, 704, 736, 768, 800)
    """Lengths of the shorter side after resizing, in pixels. One is drawn at random for each image."""
    max_size: Annotated[int, PIXELS] = 1333
    """Upper limit of the longer side in pixels. If it applies, the shorter side is shorter than the length drawn."""
    crop_first: Annotated[tuple[int, int] | None, PIXELS] = None
    """Smallest and largest side, in pixels, of a random crop before resizing. Half of the images are cropped; the sides
    refer to the image at a shortest edge of 400, 500 or 600. DETR and MaskFormer use [384, 600]. None never crops."""
    shrink: Literal["area", "bilinear"] = "area"
    """Interpolation for resizing; see `shrink` of `lsj`."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_edges(self.shortest_edges, self.max_size)
        if self.crop_first is not None and self.crop_first[0] > self.crop_first[1]:
            raise ConfigError(f"data.augment.crop_first is {list(self.crop_first)}; give [smallest, largest] side")


def _check_edges(shortest_edges: tuple[int, ...], max_size: int) -> None:
    if not shortest_edges:
        raise ConfigError("data.augment.shortest_edges is empty; list at least one size")
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
    """Simple Copy-Paste (Ghiasi et al., CVPR 2021): paste things from a second augmented image onto an image."""

    probability: Annotated[float, SHARE_ABOVE_0] = 1.0
    """Share of the images that receive objects. Each thing of the second image is pasted with probability 1/2."""


@dataclass(frozen=True, kw_only=True)
class MixtureItem(Section):
    """One data set of a training mixture."""

    dataset: str
    """Name of a data set under `datasets`."""
    weight: Annotated[float, ABOVE_0] = 1.0
    """Relative share of the samples. Only the ratios between weights matter."""
    include: tuple[str, ...] = ()
    """Class names. Use only images that show at least one of these classes; crowds do not count. Empty uses all."""
    exclude: tuple[str, ...] = ()
    """Class names. Leave out images that show any of these classes; crowds do not count."""
    fraction: Annotated[float, SHARE_ABOVE_0] = 1.0
    """Share of the remaining images to use. The selection is fixed; a larger share contains a smaller one."""
    limit: Annotated[int | None, FROM_1] = None
    """Largest number of images, selected in the same way as for `fraction`. None sets no limit."""
    repeat_threshold: Annotated[float | None, SHARE_ABOVE_0] = None
    """Repeat images with rare classes. An image whose rarest class is in a share f of the images is shown
    max(1, sqrt(repeat_threshold / f)) times per epoch on average. LVIS uses 0.001. None repeats nothing."""


@dataclass(frozen=True, kw_only=True)
class CacheConfig(Section):
    """Cache of object-store reads on a local disk of each machine, shared by the ranks of that machine."""

    folder: str
    """Folder on a local disk. Several runs may share it."""
    max_gb: Annotated[float, GIGABYTES]
    """Size limit in GB (10^9 bytes). Data whose next use is farthest away is evicted first. If the disk is full, the
    cache shrinks and training continues."""


@dataclass(frozen=True, kw_only=True)
class DataConfig(Section):
    """Training data and how it is read, augmented and loaded."""

    task: Task = "panoptic"
    """What the model predicts: `panoptic` (segments of all pixels), `instance` (objects) or `semantic` (a class per
    pixel)."""
    train: tuple[MixtureItem, ...]
    """Data sets of the training mixture, with their shares."""
    augment: AugmentConfig = field(default_factory=LargeScaleJitter)
    """Random augmentation, which also brings images to the input size of the network."""
    copy_paste: CopyPasteConfig | None = None
    """Paste objects from other images. Needs an `augment` with a fixed size (`lsj` or `shortest_edge`)."""
    crop_padding: Literal["mean", "grey"] = "mean"
    """Value of padding if a crop is larger than its image. `mean`: 0 after normalisation. `grey`: 128 before
    normalisation, as in the official code."""
    rasterise: Literal["source", "crop"] = "source"
    """Size at which polygons become masks. `source`: once at the size of the source image, then resized with the image.
    `crop`: at the size of the crop, as in the official code. `crop` gives enlarged small objects smooth borders, takes
    more time per image and needs the task `instance`."""
    drop_empty_targets: bool = True
    """Drop targets that have no pixel left in the crop. The official panoptic mapper keeps them."""
    skip_images_without_targets: bool = True
    """Leave out images that have no target for the task."""
    workers: Annotated[int, FROM_0] = 2
    """Loader processes per rank. 0 uses one thread in the training process."""
    prefetch_steps: Annotated[int, STEPS] = 2
    """Number of steps whose batches are prepared ahead."""
    chunk_mb: Annotated[float, MEGABYTES] = 4.0
    """Size of one ranged read in MB (10^6 bytes)."""
    lanes: Annotated[int, FROM_1] = 192
    """Number of streams of samples from which the order takes samples in turn. If the number of ranks divides it,
    almost every chunk is read once, otherwise several times. 192 is divisible by 1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48,
    64, 96 and 192. `m2f plan` computes the cost for other numbers."""
    window: Annotated[int, FROM_1] = 32
    """Shuffle window of a lane, in samples. All ranks together hold the files of about lanes x window samples."""
    cache: CacheConfig | None = None
    """Cache of object-store reads on a local disk. None reads the store again in every epoch."""
    max_bad_samples: Annotated[int, FROM_0] = 0
    """Number of damaged or unreadable samples that are tolerated; one more stops training. Each is reported and
    replaced by the next good sample of the order. 0 stops at the first."""
    accept_changes: bool = False
    """Resume although data sets, weights, filters, seed, chunk_mb, lanes or window have changed. The new order then
    starts at its first position. False refuses to resume after such a change."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.train:
            raise ConfigError("data.train is empty: list at least one data set, for example [{dataset: train}]")
        if self.rasterise == "crop" and self.task != "instance":
            raise ConfigError(
                f"data.rasterise is crop, which draws the polygons of instances, but data.task is {self.task}; set "
                "data.rasterise to source"
            )
        if self.copy_paste is not None and isinstance(self.augment, ScaleJitter):
            raise ConfigError(
                "data.copy_paste needs images of equal size, but data.augment.kind scale gives different sizes; use "
                "lsj or shortest_edge"
            )
