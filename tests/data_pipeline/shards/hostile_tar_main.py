"""Indexes one tar: `hostile_tar_main.py TAR CATEGORIES`.

Prints the samples and faults found, or the error, and the growth of peak memory in MB, as JSON.
"""

import json
import sys
from pathlib import Path

from m2f.data_pipeline.errors import DataError
from m2f.data_pipeline.readers.category_file import read_category_file
from m2f.data_pipeline.shards import tar_walk
from m2f.data_pipeline.shards.index import IndexOptions, detect_format, index_tars
from m2f.data_pipeline.storage.storage import Storage


def peak_mb() -> float:
    """Return the peak resident memory of this process in MB."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return int(status.split("VmHWM:")[1].split()[0]) / 1e3


if __name__ == "__main__":
    tar, categories = sys.argv[1:]
    tar_walk._MAX_SAMPLE_BYTES = 60_000_000  # the default of 1 GB would take long to read
    table, void = read_category_file(categories, ())
    options = IndexOptions(categories=table, void=void, labels="classes", max_pixels=10_000)
    before = peak_mb()
    try:
        tar_format = detect_format(tar, options, Storage())
        report = index_tars([tar], f"{tar}.set", tar_format, options, Storage(), skip_bad=True)
        result = {"keys": report.num_samples, "faults": [fault.problem for fault in report.faults]}
    except DataError as error:
        result = {"error": str(error)}
    sys.stdout.write(json.dumps(result | {"mb": peak_mb() - before}))
