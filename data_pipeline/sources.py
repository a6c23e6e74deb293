"""Settings of raw data sources, one class per kind of source (standard library only)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from m2f.model.errors import ConfigError
from m2f.model.limits import (
    FROM_0,
    FROM_1,
    SHARE,
    Range,
    Section,
)

SMALL_DIAMETER = Range(4, 30, below=True, unit="pixels")
"""Allowed diameters of small synthetic objects. The other objects have at least 30 pixels."""


@dataclass(frozen=True, kw_only=True)
class SyntheticSource(Section):
    """Generated images of textured shapes, with COCO panoptic and instance annotations."""

    kind: Literal["synthetic"] = "synthetic"
    num_images: Annotated[int, FROM_1] = 1000
    """Number of generated images."""
    seed: Annotated[int, FROM_0] = 0
    """Random seed. Data sets with different seeds share no image."""
    image_id_start: Annotated[int, FROM_0] = 1
    """Id of the first image; ids count up from it."""
    small_share: Annotated[float, SHARE] = 0.25
    """Share of objects that are small. Small objects lie on top of the others and are never hidden."""
    small_diameters: Annotated[tuple[float, float], SMALL_DIAMETER] = (8.0, 11.5)
    """Smallest and largest diameter of small objects, in pixels. The other objects have diameters of 30 to 60."""

    def __post_init__(self) -> None:
        super().__post_init__()
        low, high = self.small_diameters
        if low > high:
            raise ConfigError(
                f"datasets.<name>.source.small_diameters is {[low, high]}; put the smaller diameter first"
            )


@dataclass(frozen=True, kw_only=True)
class CocoPanopticSource(Section):
    """COCO panoptic format: a folder of images, a JSON file and a folder of id PNGs."""

    kind: Literal["coco_panoptic"] = "coco_panoptic"
    images: str
    """Folder of the images."""
    panoptic_json: str
    """JSON file with images, categories and the segments of every image."""
    panoptic_masks: str
    """Folder of the PNGs whose colours are segment ids."""
    instances_json: str | None = None
    """JSON file with COCO instances of the same images, stored in layers beside the panoptic map. None if there is no
    such file."""


@dataclass(frozen=True, kw_only=True)
class CocoInstancesSource(Section):
    """COCO instances format: polygons, or compressed or uncompressed RLE. Overlapping objects are stored in layers."""

    kind: Literal["coco_instances"] = "coco_instances"
    images: str
    """Folder of the images."""
    instances_json: str
    """JSON file with images, categories and annotations."""
    crowds_are_objects: bool = False
    """Treat annotations with `iscrowd: 1` as objects. CVAT and datumaro mark every painted mask in this way."""


@dataclass(frozen=True, kw_only=True)
class LabelMapSource(Section):
    """A folder of images and a folder of class maps with the same file stems (CamVid, Pascal VOC, your own data)."""

    kind: Literal["label_maps"] = "label_maps"
    images: str
    """Folder of the images."""
    labels: str
    """Folder of the class maps (PNG, TIFF or BMP), whose pixel values are labels."""
    categories: str
    """JSON list of `{label, name, color, isthing}`; `label` is the pixel value."""
    void: tuple[int, ...] = (255,)
    """Pixel values without a label."""
    suffix: str = ""
    """Text between the image's stem and the extension of its map. With `_mask`, `a.jpg` belongs to `a_mask.png`."""
    image_suffix: str = ""
    """Text between the stem and the extension of the images. With `_sat`, the stem of `a_sat.jpg` is `a`."""


@dataclass(frozen=True, kw_only=True)
class HuggingFaceSource(Section):
    """A folder of images and a folder of colour maps with the same file stems.

    Red is the class, and green + 256 x blue is the instance number.
    """

    kind: Literal["huggingface"] = "huggingface"
    images: str
    """Folder of the images."""
    annotations: str
    """Folder of the colour images (PNG, TIFF or BMP)."""
    categories: str
    """JSON list of `{label, name, color, isthing}`; `label` is the value of the red channel."""
    void: tuple[int, ...] = (0, 255)
    """Values of the red channel without a label."""


@dataclass(frozen=True, kw_only=True)
class YoloSegSource(Section):
    """YOLO segmentation: a text file per image with a line per object. All classes are things."""

    kind: Literal["yolo_seg"] = "yolo_seg"
    images: str
    """Folder of the images."""
    labels: str
    """Folder of the text files, which are named after the images."""
    data_yaml: str
    """File with the class names: data.yaml of the export, of which only `names` is read, or classes.txt with one name
    per line."""
    image_set: str | None = None
    """Text file with the path of one image per line, for example `train.txt`. None uses all images."""


@dataclass(frozen=True, kw_only=True)
class LabelmeSource(Section):
    """labelme: a JSON file per image. Shapes with the same label and `group_id` form one object.

    All classes are things.
    """

    kind: Literal["labelme"] = "labelme"
    images: str
    """Folder of the images."""
    annotations: str
    """Folder of the JSON files; may be the folder of the images."""
    classes: tuple[str, ...] = ()
    """Labels in class order. Empty uses all labels that appear, sorted. List them if several data sets must agree."""


@dataclass(frozen=True, kw_only=True)
class CvatSource(Section):
    """`CVAT for images 1.1`: one XML file. Shapes with the same label and group form one object.

    All classes are things.
    """

    kind: Literal["cvat"] = "cvat"
    images: str
    """Folder of the images."""
    annotations: str
    """XML file of the export, annotations.xml."""
    subset: str | None = None
    """Subset of a project whose images are used. Empty uses the images without a subset, None uses all images."""


@dataclass(frozen=True, kw_only=True)
class VocSource(Section):
    """Pascal VOC segmentation. Class 0 is the background, all others are things; 255 is void."""

    kind: Literal["voc"] = "voc"
    images: str
    """Folder `JPEGImages`."""
    class_maps: str
    """Folder `SegmentationClass`."""
    object_maps: str
    """Folder `SegmentationObject`. For data sets without it use the kind `label_maps`."""
    image_set: str | None = None
    """File with one image name per line, for example `ImageSets/Segmentation/train.txt`. None uses all class maps."""
    legend: str | None = None
    """File with the classes in order: `labelmap.txt`, or `class_names.txt` of labelme. None uses the 20 VOC classes."""


@dataclass(frozen=True, kw_only=True)
class ColorMapSource(Section):
    """A folder of images and a folder of RGB maps in which each colour is a class. All classes are stuff."""

    kind: Literal["color_maps"] = "color_maps"
    images: str
    """Folder of the images."""
    labels: str
    """Folder of the RGB maps."""
    legend: str
    """File with the colour of each class: `labelmap.txt` (`name:r,g,b::`), `class_dict.csv` (`name,r,g,b`) or
    `label_colors.txt` (`r g b name`)."""
    void: tuple[str, ...] = ("void", "unlabeled", "unlabelled")
    """Names in the legend that are not classes; case is ignored. Their pixels have no label."""
    suffix: str = ""
    """Text between the image's stem and the extension of its map. With `_L`, `a.png` belongs to `a_L.png`."""
    image_suffix: str = ""
    """Text between the stem and the extension of the images. With `_sat`, the stem of `a_sat.jpg` is `a`."""


@dataclass(frozen=True, kw_only=True)
class CocoStuffSource(Section):
    """Semantic pixel maps of COCO-Stuff (`stuffthingmaps`) with 182 ids."""

    kind: Literal["coco_stuff"] = "coco_stuff"
    images: str
    """Folder of the images."""
    labels: str
    """Folder of the pixel maps."""
    label_names: str
    """File `labels.txt` of the release, with `id: name` on each line."""


@dataclass(frozen=True, kw_only=True)
class Ade20kSource(Section):
    """One split of ADE20K in the layout of the 2016 challenge (150 classes, 100 of them things)."""

    kind: Literal["ade20k"] = "ade20k"
    images: str
    """Folder of the images."""
    annotations: str
    """Folder of the label maps."""
    instances: str | None = None
    """Folder `annotations_instance/<split>`, which makes the data set panoptic. None keeps it semantic, with unchanged
    labels."""


@dataclass(frozen=True, kw_only=True)
class Ade20kFullSource(Section):
    """The full release of ADE20K (2021), in which each image lies beside its `_seg.png`."""

    kind: Literal["ade20k_full"] = "ade20k_full"
    folder: str
    """Folder of a split, or of one scene in it. All subfolders are read."""
    categories: str | None = None
    """JSON list of `{label, name, color, isthing}`; `label` is the class index `name_ndx` of the release. None uses the
    847 classes of the usual benchmark. Other classes are void."""


@dataclass(frozen=True, kw_only=True)
class CityscapesSource(Section):
    """Cityscapes from `*_instanceIds.png`: 19 classes, 8 of them things. Group regions are crowds."""

    kind: Literal["cityscapes"] = "cityscapes"
    images: str
    """Folder `leftImg8bit/<split>`."""
    annotations: str
    """Folder `gtFine/<split>` or `gtCoarse/<split>`."""


@dataclass(frozen=True, kw_only=True)
class CityscapesPanopticSource(Section):
    """Cityscapes in the COCO panoptic format that its official scripts write."""

    kind: Literal["cityscapes_panoptic"] = "cityscapes_panoptic"
    images: str
    """Folder `leftImg8bit/<split>`. Images are found by their ids in the JSON file."""
    panoptic_json: str
    """JSON file with images, categories and the segments of every image."""
    panoptic_masks: str
    """Folder of the PNGs whose colours are segment ids."""


@dataclass(frozen=True, kw_only=True)
class MapillarySource(Section):
    """Mapillary Vistas 1.2 or 2.0, read from its instance maps."""

    kind: Literal["mapillary"] = "mapillary"
    images: str
    """Folder of the images."""
    instances: str
    """Folder of the 16-bit PNGs: `<split>/<version>/instances`, or `<split>/instances` in older copies of 1.2."""
    config_json: str
    """Config file of the same version, which lists the labels."""


@dataclass(frozen=True, kw_only=True)
class CustomSource(Section):
    """Samples that your own code writes with `m2f.data_pipeline.shards.write.write_dataset`, not with `m2f shard`."""

    kind: Literal["custom"] = "custom"
    version: int = 1
    """Version of your data. Increase it if the data or the code changes, so that old and new shards are not mixed."""


SourceConfig = (
    SyntheticSource
    | CocoPanopticSource
    | CocoInstancesSource
    | LabelMapSource
    | HuggingFaceSource
    | YoloSegSource
    | LabelmeSource
    | CvatSource
    | VocSource
    | ColorMapSource
    | CocoStuffSource
    | Ade20kSource
    | Ade20kFullSource
    | CityscapesSource
    | CityscapesPanopticSource
    | MapillarySource
    | CustomSource
)
