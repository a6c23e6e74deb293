"""Opens FOLDER/file.parquet or a data set in FOLDER through a DOOR; prints what came of it and the megabytes taken."""

import json
import sys
from collections.abc import Callable
from pathlib import Path

from hostile_manifest_main import peak_mb

from m2f.data_pipeline.config import DatasetConfig
from m2f.data_pipeline.readers import open_reader, source_fingerprint
from m2f.data_pipeline.shards.sources import compare_sources
from m2f.data_pipeline.shards.write import complete_parts, plan_shards
from m2f.data_pipeline.sources import LabelMapSource
from m2f.data_pipeline.storage.storage import Storage
from m2f.eval.errors import EvaluationError
from m2f.eval.results.images import read_image_records


def images(folder: Path) -> str:
    try:
        read_image_records((folder / "file.parquet").read_bytes())
    except EvaluationError as error:
        return str(error)
    return "read"


def source(folder: Path) -> LabelMapSource:
    return LabelMapSource(images=f"{folder}/images", labels=f"{folder}/labels", categories=f"{folder}/classes.json")


def parts(folder: Path) -> str:
    made = source(folder)
    config = DatasetConfig(shards=f"{folder}/shards", source=made)
    plan = plan_shards(open_reader(made), config, source_fingerprint(made))
    return f"{len(complete_parts(plan, Storage()))} parts"


def records(folder: Path) -> str:
    changes = compare_sources(open_reader(source(folder)), f"{folder}/shards", 1, Storage())
    return f"{len(changes.digests)} records"


DOORS: dict[str, Callable[[Path], str]] = {"images": images, "parts": parts, "records": records}

if __name__ == "__main__":
    door, before = DOORS[sys.argv[1]], peak_mb()
    said = door(Path(sys.argv[2]))
    sys.stdout.write(json.dumps({"said": said, "mb": peak_mb() - before}))
