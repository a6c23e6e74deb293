"""Zip files for the evaluation servers of COCO and ADE20K, made from a folder of predictions.

Names and structure follow cocodataset.org/#upload and sceneparsing.csail.mit.edu. COCO requires the name
`TYPE_SET_ALGORITHM_results` for the zip file and for the JSON file in it. For panoptic results, the folder of PNGs
beside the JSON file has the same name. ADE20K requires one PNG per image, named like the image.
"""

from __future__ import annotations

import re
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from m2f.cluster.predict.inputs import ImageInput, ImageList
from m2f.data_pipeline.categories import Category, Task
from m2f.data_pipeline.keys import check_key
from m2f.data_pipeline.readers.ade20k_classes import CATEGORIES_150
from m2f.model.errors import ConfigError
from m2f.model.format_count import format_count

Server = Literal["coco", "ade20k"]
_LIST_NAME = re.compile(r"(?:panoptic_)?image_info_(.+)")


def check_submission(
    server: Server, task: Task, classes: Sequence[Category], image_list: ImageList | None, algorithm: str
) -> None:
    """Raise ConfigError if the server would refuse the results. Call this before a prediction, which may take hours."""
    if not re.fullmatch(r"[A-Za-z0-9-]+", algorithm):
        raise ConfigError(
            f"--algorithm is {algorithm!r}; use letters, digits and `-` only, as it is part of file names"
        )
    if server == "ade20k":
        if task != "semantic":
            raise ConfigError(f"the ADE20K server accepts label maps, not {task} results; give --task semantic")
        if [c.id for c in classes] != [c.id for c in CATEGORIES_150.categories]:
            raise ConfigError(
                f"the ADE20K server expects ids 1 to 150, but the model has {len(classes)} classes with ids from "
                f"{min(c.id for c in classes)} to {max(c.id for c in classes)}; use a model trained on the ADE20K "
                "challenge data"
            )
        return
    if task == "semantic":
        raise ConfigError("the COCO servers accept panoptic results and masks; give --task panoptic or --task instance")
    if image_list is None:
        raise ConfigError(
            "the COCO servers need the ids of their images; give --image-info "
            + ("panoptic_image_info_test-dev2017.json" if task == "panoptic" else "image_info_test-dev2017.json")
        )
    submitted_classes = [c for c in classes if c.is_thing or task == "panoptic"]
    if mismatched := [c for c in submitted_classes if image_list.categories.get(c.id) != c.name]:
        raise ConfigError(
            f"{format_count(len(mismatched), 'category', 'categories')} of the model, such as {mismatched[0].id} "
            f"({mismatched[0].name}), do not match {image_list.path}; panoptic results need "
            "panoptic_image_info_*.json, and a model of COCO needs its training data, which contain the names"
        )


def write_submission(
    folder: Path,
    server: Server,
    task: Task,
    images: Sequence[ImageInput],
    image_list: ImageList | None,
    algorithm: str,
) -> Path:
    """Zip the predictions of `images`, as `m2f predict` wrote them to `folder`, and return the path of the zip file.

    The zip file is in `folder`. Other predictions in the folder, which earlier calls wrote, are left out.
    """
    maps = sorted(f"{image.name}.png" for image in images)
    if server == "ade20k":
        path = folder / f"ade20k_{algorithm}.zip"
        _write_zip(path, {name: folder / "labels" / name for name in maps})
        return path
    assert image_list is not None
    kind = "panoptic" if task == "panoptic" else "detections"
    match = _LIST_NAME.fullmatch(image_list.path.stem)
    name = f"{kind}_{match[1] if match else image_list.path.stem}_{algorithm}_results"
    if kind == "panoptic":
        members = {f"{name}.json": folder / "panoptic.json"}
        members |= {f"{name}/{file}": folder / "panoptic" / file for file in maps}
    else:
        members = {f"{name}.json": folder / "instances.json"}
    path = folder / f"{name}.zip"
    _write_zip(path, members)
    return path


def _write_zip(path: Path, members: dict[str, Path]) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, file in members.items():
            stored = zipfile.ZIP_STORED if name.endswith(".png") else None  # PNG files are already compressed
            archive.write(file, check_key(name, str(path)), compress_type=stored)
