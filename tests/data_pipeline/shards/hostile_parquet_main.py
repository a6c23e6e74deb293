"""Reads a hostile Parquet file: `hostile_parquet_main.py READER FOLDER`; READER is a key of READERS.

Prints the result or error, and the growth of peak memory in MB, as JSON.
"""

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


def read_images(folder: Path) -> str:
    try:
        read_image_records((folder / "file.parquet").read_bytes())
    except EvaluationError as error:
        return str(error)
    return "read"


def make_source(folder: Path) -> LabelMapSource:
    return LabelMapSource(images=f"{folder}/images", labels=f"{folder}/labels", categories=f"{folder}/classes.json")


def read_parts(folder: Path) -> str:
    source = make_source(folder)
    config = DatasetConfig(shards=f"{folder}/shards", source=source)
    plan = plan_shards(open_reader(source), config, source_fingerprint(source))
    return f"{len(complete_parts(plan, Storage()))} parts"


def read_source_records(folder: Path) -> str:
    changes = compare_sources(open_reader(make_source(folder)), f"{folder}/shards", 1, Storage())
    return f"{len(changes.digests)} records"


READERS: dict[str, Callable[[Path], str]] = {"images": read_images, "parts": read_parts, "records": read_source_records}

if __name__ == "__main__":
    reader, before = READERS[sys.argv[1]], peak_mb()
    result = reader(Path(sys.argv[2]))
    sys.stdout.write(json.dumps({"output": result, "mb": peak_mb() - before}))
