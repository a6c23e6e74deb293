"""Reads a data set and logs what it read: `reading_main.py FOLDER LOG STEPS WORKERS CACHE`; CACHE may be empty.

Every finished step is one line of the log. A reader that was killed resumes after the last complete line.
"""

import hashlib
import json
import sys
from itertools import islice
from pathlib import Path

from m2f.data_pipeline.config import CacheConfig, DataConfig, LargeScaleJitter, MixtureItem
from m2f.data_pipeline.loading.loader import LoaderSpec, build_loader
from m2f.data_pipeline.order.order import build_order
from m2f.data_pipeline.shards.manifest import Manifest
from m2f.data_pipeline.storage.storage import Storage

BATCH = 4


def read_steps(folder, log, steps, workers, cache):
    """Append (position, key, SHA-256 of the pixels) per step, resuming after the last complete line of the log."""
    path = Path(log)
    complete_lines = (
        [line for line in path.read_text().splitlines(True) if line.endswith("\n")] if path.exists() else []
    )
    path.write_text("".join(complete_lines))
    manifest = Manifest.load(folder, Storage())
    data = DataConfig(
        train=(MixtureItem(dataset="a"),),
        augment=LargeScaleJitter(size=48),
        workers=workers,
        chunk_mb=0.03,
        lanes=6,
        window=8,
        cache=CacheConfig(folder=cache, max_gb=0.0002) if cache else None,
    )
    spec = LoaderSpec(global_batch=BATCH, micro_batch=2, rank=0, world=1, start_step=len(complete_lines), seed=5)
    loader = build_loader([manifest], build_order([manifest], 5, data), data, Storage(), spec)
    with path.open("a") as file:
        for step in islice(loader, steps - len(complete_lines)):
            rows = [
                (position, key, hashlib.sha256(batch.images[row].numpy().tobytes()).hexdigest())
                for batch in step.micro_batches
                for row, (position, key) in enumerate(zip(batch.targets.position.tolist(), batch.keys, strict=True))
            ]
            file.write(json.dumps(rows) + "\n")
            file.flush()
    loader.close()


if __name__ == "__main__":
    folder, log, steps, workers, cache = sys.argv[1:]
    read_steps(folder, log, int(steps), int(workers), cache)
