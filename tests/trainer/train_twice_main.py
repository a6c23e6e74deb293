"""Train two runs, one after the other, in one process: `train_twice_main.py FOLDER SHARDS`."""

import sys
from pathlib import Path

from m2f.trainer.worker import run_worker
from tests.trainer.tiny_job import make_job

if __name__ == "__main__":
    folder, shards = sys.argv[1:]
    for name in ("first", "second"):
        assert run_worker(make_job(Path(folder) / name, shards, max_steps=2)).step == 2
