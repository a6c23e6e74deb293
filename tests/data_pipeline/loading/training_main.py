"""Reads with two loader processes, prints their process ids and sleeps: `training_main.py`."""

import sys
import time

from torch.utils.data import DataLoader

from m2f.data_pipeline.loading.loader import _start_worker, _worker_context

if __name__ == "__main__":
    loader = iter(
        DataLoader(
            range(9), None, num_workers=2, multiprocessing_context=_worker_context(), worker_init_fn=_start_worker
        )
    )
    next(loader)
    sys.stdout.write(" ".join(str(worker.pid) for worker in loader._workers) + "\n")
    sys.stdout.flush()
    time.sleep(600)
