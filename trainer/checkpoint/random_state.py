"""Random states of one rank: Python, NumPy, torch on CPU and on the rank's GPU."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import torch

from m2f.trainer.engine.safe_load import safe_loads


def save_random_state(path: Path) -> None:
    """Write all random states as plain tensors and numbers, so that reading them runs no code."""
    version, python, gauss = random.getstate()
    name, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    state = {
        "python": [version, list(python), gauss],
        "numpy": [str(name), torch.from_numpy(np.asarray(keys).astype(np.int64)), position, has_gauss, cached],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(state, path)


def load_random_state(path: Path) -> None:
    """Restore what `save_random_state` wrote. Raises CheckpointError for a file that requires code."""
    with safe_loads():
        state = torch.load(path, weights_only=True)
    version, python, gauss = state["python"]
    random.setstate((version, tuple(python), gauss))
    name, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), position, has_gauss, cached))
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
