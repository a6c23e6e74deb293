"""Reader of YOLO segmentation: a text file per image, a line per object, and coordinates as shares of the sides."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path, PurePosixPath

from m2f.data_pipeline.categories import CategoryTable
from m2f.data_pipeline.documents import DocumentError, parse_yaml
from m2f.data_pipeline.errors import DataError, format_list
from m2f.data_pipeline.image_file import is_image_name
from m2f.data_pipeline.readers.coco_instances import CocoInstancesReader
from m2f.data_pipeline.readers.coco_json import require_unique
from m2f.data_pipeline.readers.exports.object_parts import (
    AnnotatedImage,
    ObjectPart,
    categories_from_names,
    shapes_reader,
)
from m2f.data_pipeline.readers.files import displayed_size, files_below, read_bytes, require_file, require_folder
from m2f.data_pipeline.readers.unusable import UnusableAnnotation
from m2f.data_pipeline.sources import YoloSegSource
from m2f.model.format_count import format_count


def open_yolo_seg(source: YoloSegSource, max_pixels: int) -> CocoInstancesReader:
    """Return the reader of the data set. By the format's rules, an image without a text file has no object.

    Each line is one object. Exports join several rings of an object by line segments that run there and back, so they
    add no area.

    Raises:
        DataError: the class file is invalid, `image_set` lists other images, there is no image, or no image has a text
            file.
    """
    images, labels = require_folder(source.images), require_folder(source.labels)
    categories = read_yolo_classes(source.data_yaml)
    names = sorted(p.relative_to(images).as_posix() for p in files_below(images, "") if is_image_name(p.name))
    used = names if source.image_set is None else _listed_images(source.image_set, images, names)
    unusable: list[UnusableAnnotation] = []
    annotated, labelled = [], False
    texts = files_below(labels, ".txt")
    by_stem = {str(file.relative_to(labels).with_suffix("")): file for file in texts}  # also files named a.TXT
    for name in used:
        height, width = displayed_size(images / name)
        file = labels / Path(name).with_suffix(".txt")
        if not file.is_file():
            file = by_stem.get(str(Path(name).with_suffix("")), file)
        labelled = labelled or file.is_file()
        parts = _read_lines(file, height, width, categories, unusable) if file.is_file() else ()
        annotated.append(AnnotatedImage(name, height, width, tuple(parts)))
    if annotated and not labelled:
        raise DataError(
            f"{labels} has no text file for any image in {images}, so all images would count as empty; put NAME.txt "
            "there for each NAME.jpg, or correct datasets.<name>.source.labels"
        )
    stems = {str(Path(name).with_suffix("")) for name in names}
    for file in texts:
        stem = str(file.relative_to(labels).with_suffix(""))
        if stem not in stems and file.name != "classes.txt":
            unusable.append(UnusableAnnotation(str(file), f"its image {stem}.* is not in {images}"))
    return shapes_reader(images, categories, annotated, max_pixels, unusable)


def read_yolo_classes(path: str) -> CategoryTable:
    """Return the classes of a data.yaml or of a text file.

    In a YAML file, `names` is a list or a mapping with the keys 0, 1, 2, ... A `.txt` file has one name per line.

    Raises:
        DataError: the file is missing or invalid, or belongs to a pose data set. The message names the file.
    """
    require_file(path)
    if path.endswith(".txt"):
        lines = read_bytes(Path(path)).decode("utf-8-sig", errors="replace").rstrip().splitlines()
        names = [line.strip() for line in lines]
        if "" in names:  # the number of a line is the id of its class
            raise DataError(f"{path}: line {names.index('') + 1} is empty; give the class a name, or remove the line")
        return categories_from_names(names)
    try:
        document = parse_yaml(read_bytes(Path(path)))
    except DocumentError as error:
        raise DataError(f"{path} is not valid YAML: {error}") from error
    if isinstance(document, dict) and "kpt_shape" in document:
        raise DataError(f"{path} has `kpt_shape`: its labels are boxes with keypoints; export polygons instead")
    names = document.get("names") if isinstance(document, dict) else None
    if isinstance(names, dict) and set(names) == set(range(len(names))):
        names = [names[i] for i in range(len(names))]
    if not isinstance(names, list) or not names:
        raise DataError(f"{path} has no `names`: a list of classes, or a mapping with the keys 0, 1, 2, ...")
    return categories_from_names([str(name) for name in names])


def read_image_paths(file: str) -> list[PurePosixPath]:
    """Return the paths that a text file lists, one per line. Raises DataError if the file cannot be read."""
    require_file(file)
    lines = read_bytes(Path(file)).decode("utf-8-sig", errors="replace").splitlines()
    return [PurePosixPath(line.strip().replace("\\", "/")) for line in lines if line.strip()]


def _listed_images(file: str, images: Path, names: Sequence[str]) -> list[str]:
    """Return those of the names in the folder `images` that a text file lists, sorted.

    A listed path is a name, or ends with the folder and a name. The folders before them are those of the machine that
    wrote the file.

    Raises:
        DataError: the file lists another image, or an image twice, or cannot be read.
    """
    image_names, found, missing = set(names), [], []
    for path in read_image_paths(file):
        ends = [(i, "/".join(path.parts[i:])) for i in range(len(path.parts))]
        listed = [name for i, name in ends if name in image_names and (i == 0 or path.parts[i - 1] == images.name)]
        found += listed[:1]
        missing += [] if listed else [path]
    if missing:
        count = format_count(len(missing), "image")
        raise DataError(f"{file} lists {count} not in {images}: {format_list(missing)}; add them or remove their lines")
    require_unique(found, f"images in {file}")
    return sorted(found)


def _read_lines(
    file: Path, height: int, width: int, categories: CategoryTable, unusable: list[UnusableAnnotation]
) -> list[ObjectPart]:
    parts = []
    for number, line in enumerate(read_bytes(file).decode("utf-8-sig", errors="replace").splitlines(), start=1):
        if not line.strip():
            continue
        try:
            parts.append(_read_line(line.split(), height, width, categories))
        except DataError as error:
            unusable.append(UnusableAnnotation(str(file), f"line {number} {error}"))
    return parts


def _read_line(words: list[str], height: int, width: int, categories: CategoryTable) -> ObjectPart:
    try:
        label, values = float(words[0]), [float(word) for word in words[1:]]  # some tools write 0.0
    except ValueError:
        raise DataError("contains a value that is not a number") from None
    if label not in categories.by_id:
        raise DataError(f"has class {words[0][:20]}, which is not in the list of classes")
    if len(values) == 4:
        raise DataError("is a box; boxes alone cannot be used, export polygons")
    if len(values) < 6 or len(values) % 2:
        raise DataError(f"has {len(values)} numbers after the class; a polygon needs x and y of at least 3 points")
    if not all(-0.5 <= value <= 1.5 for value in values):
        raise DataError("has coordinates far outside 0..1; they must be fractions of the image's width and height")
    sides = (width, height) * (len(values) // 2)
    return ObjectPart(int(label), [value * side for value, side in zip(values, sides, strict=True)])
