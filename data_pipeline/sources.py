"""Settings of sources: what a data set is read from, one kind per class (standard library only)."""

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


@dataclass(frozen=True, kw_only=True)
class SyntheticSource(Section):
    """Textured shapes made by the project itself, in COCO panoptic and instances form."""

    kind: Literal["synthetic"] = "synthetic"
    num_images: Annotated[int, FROM_1] = 1000
    """Images that are made."""
    seed: Annotated[int, FROM_0] = 0
    """Sets with different seeds share no image."""
    image_id_start: Annotated[int, FROM_0] = 1
    """Id of the first image; the others count up from it."""
    small_share: Annotated[float, SHARE] = 0.25
    """Share of objects that are small: they lie on top of the others, and nothing hides them."""
    small_diameters: Annotated[tuple[float, float], SMALL_DIAMETER] = (8.0, 11.5)
    """Least and largest diameter of small objects; the others have 30 to 60 pixels."""

    def __post_init__(self) -> None:
        super().__post_init__()
        low, high = self.small_diameters
        if low > high:
            raise ConfigError(
                f"datasets.<name>.source.small_diameters is {[low, high]}; put the smaller diameter first"
            )


@dataclass(frozen=True, kw_only=True)
class CocoPanopticSource(Section):
    """COCO panoptic format: images, a JSON and a folder of id PNGs."""

    kind: Literal["coco_panoptic"] = "coco_panoptic"
    images: str
    """Folder of the images."""
    panoptic_json: str
    """JSON file with images, categories and the segments of every image."""
    panoptic_masks: str
    """Folder of the PNGs whose colours are segment ids."""
    instances_json: str | None = None
    """COCO instances of the same images, kept in layers beside the panoptic map; None where there are none."""


@dataclass(frozen=True, kw_only=True)
class CocoInstancesSource(Section):
    """COCO instances format: polygons, compressed or uncompressed RLE; overlaps are kept in layers."""

    kind: Literal["coco_instances"] = "coco_instances"
    images: str
    """Folder of the images."""
    instances_json: str
    """JSON file with images, categories and annotations."""
    crowds_are_objects: bool = False
    """Take annotations with `iscrowd: 1` as objects. CVAT and datumaro write it for every mask that was painted."""


@dataclass(frozen=True, kw_only=True)
class LabelMapSource(Section):
    """A folder of images and a folder of class maps with the same stems (CamVid, Pascal VOC, own data)."""

    kind: Literal["label_maps"] = "label_maps"
    images: str
    """Folder of the images."""
    labels: str
    """Folder of the class maps: PNGs whose pixel values are labels."""
    categories: str
    """JSON list of `{label, name, color, isthing}`; `label` is the pixel value."""
    void: tuple[int, ...] = (255,)
    """Pixel values that carry no label."""
    suffix: str = ""
    """What follows the image's name in that of its map, for example `_mask`."""


@dataclass(frozen=True, kw_only=True)
class HuggingFaceSource(Section):
    """A folder of images and a folder of colour PNGs with the same stems: red is the class, green the instance."""

    kind: Literal["huggingface"] = "huggingface"
    images: str
    """Folder of the images."""
    annotations: str
    """Folder of the colour PNGs."""
    categories: str
    """JSON list of `{label, name, color, isthing}`; `label` is the value of the red channel."""
    void: tuple[int, ...] = (0, 255)
    """Values of the red channel that carry no label."""


@dataclass(frozen=True, kw_only=True)
class YoloSegSource(Section):
    """YOLO segmentation: a text file per image, a line per object. All classes are things."""

    kind: Literal["yolo_seg"] = "yolo_seg"
    images: str
    """Folder of the images."""
    labels: str
    """Folder of the text files, which have the names of the images."""
    data_yaml: str
    """The export's data.yaml, of which only `names` are read, or its classes.txt with a name on each line."""


@dataclass(frozen=True, kw_only=True)
class LabelmeSource(Section):
    """labelme: a JSON file per image. Shapes of one label and `group_id` are one object; all classes are things."""

    kind: Literal["labelme"] = "labelme"
    images: str
    """Folder of the images."""
    annotations: str
    """Folder of the JSON files; may be that of the images."""
    classes: tuple[str, ...] = ()
    """Labels in class order; empty takes those that appear, sorted. Name them where several sets must agree."""


@dataclass(frozen=True, kw_only=True)
class CvatSource(Section):
    """`CVAT for images 1.1`: one XML file. Shapes of one label and group are one object; all classes are things."""

    kind: Literal["cvat"] = "cvat"
    images: str
    """Folder of the images."""
    annotations: str
    """The file annotations.xml."""


@dataclass(frozen=True, kw_only=True)
class VocSource(Section):
    """Pascal VOC segmentation. Class 0 is the background, all others are things; 255 is void."""

    kind: Literal["voc"] = "voc"
    images: str
    """Folder `JPEGImages`."""
    class_maps: str
    """Folder `SegmentationClass`."""
    object_maps: str
    """Folder `SegmentationObject`. For sets without it use `label_maps`."""
    image_set: str | None = None
    """File with a name per line, for example `ImageSets/Segmentation/train.txt`; None takes all class maps."""
    legend: str | None = None
    """`labelmap.txt`, or `class_names.txt` of labelme, with the classes in order; None takes the 20 of VOC."""


@dataclass(frozen=True, kw_only=True)
class ColorMapSource(Section):
    """A folder of images and a folder of RGB maps whose colours are classes. All classes are stuff."""

    kind: Literal["color_maps"] = "color_maps"
    images: str
    """Folder of the images."""
    labels: str
    """Folder of the RGB maps."""
    legend: str
    """`labelmap.txt` (`name:r,g,b::`), `class_dict.csv` (`name,r,g,b`) or `label_colors.txt` (`r g b name`)."""
    void: tuple[str, ...] = ("void", "unlabeled", "unlabelled")
    """Names, in any case, of what is no class; their pixels are ignored."""
    suffix: str = ""
    """What follows the image's name in that of its map, for example `_L`."""


@dataclass(frozen=True, kw_only=True)
class CocoStuffSource(Section):
    """Pixel maps of COCO-Stuff (`stuffthingmaps`): semantic, 182 ids."""

    kind: Literal["coco_stuff"] = "coco_stuff"
    images: str
    """Folder of the images."""
    labels: str
    """Folder of the pixel maps."""
    label_names: str
    """The release's `labels.txt`: `id: name` per line."""


@dataclass(frozen=True, kw_only=True)
class Ade20kSource(Section):
    """ADE20K in the layout of the 2016 challenge (150 classes, 100 things); folders of one split."""

    kind: Literal["ade20k"] = "ade20k"
    images: str
    """Folder of the images."""
    annotations: str
    """Folder of the label maps."""
    instances: str | None = None
    """Folder `annotations_instance/<split>`: makes the set panoptic. None keeps it semantic, every label as it is."""


@dataclass(frozen=True, kw_only=True)
class Ade20kFullSource(Section):
    """The full release of ADE20K (2021): images beside their `_seg.png`."""

    kind: Literal["ade20k_full"] = "ade20k_full"
    folder: str
    """Folder of a split, or of a scene in it; read with all folders below it."""
    categories: str | None = None
    """JSON list of `{label, name, color, isthing}`, where `label` is the class index `name_ndx` of the release; None
    takes the 847 classes of the usual benchmark. Other classes are void."""


@dataclass(frozen=True, kw_only=True)
class CityscapesSource(Section):
    """Cityscapes from `*_instanceIds.png`: 19 classes, 8 things, group regions as crowds."""

    kind: Literal["cityscapes"] = "cityscapes"
    images: str
    """Folder `leftImg8bit/<split>`."""
    annotations: str
    """Folder `gtFine/<split>` or `gtCoarse/<split>`."""


@dataclass(frozen=True, kw_only=True)
class CityscapesPanopticSource(Section):
    """Cityscapes from the COCO panoptic form that its scripts make."""

    kind: Literal["cityscapes_panoptic"] = "cityscapes_panoptic"
    images: str
    """Folder `leftImg8bit/<split>`; images are found by their ids."""
    panoptic_json: str
    """JSON file with images, categories and the segments of every image."""
    panoptic_masks: str
    """Folder of the PNGs whose colours are segment ids."""


@dataclass(frozen=True, kw_only=True)
class MapillarySource(Section):
    """Mapillary Vistas 1.2 or 2.0 from its instance maps."""

    kind: Literal["mapillary"] = "mapillary"
    images: str
    """Folder of the images."""
    instances: str
    """Folder of the 16-bit PNGs: `<split>/instances` (older copies of 1.2) or `<split>/<version>/instances`."""
    config_json: str
    """The config file of the same version, which lists the labels."""


@dataclass(frozen=True, kw_only=True)
class CustomSource(Section):
    """Samples that your own code writes with `m2f.data_pipeline.shards.write.write_dataset`; not for `m2f shard`."""

    kind: Literal["custom"] = "custom"
    version: int = 1
    """Count up when the data or the code changes, so that old and new shards are not mixed."""


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
