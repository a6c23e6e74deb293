"""Assign a GPU to every rank, and check that no two ranks share one."""

from __future__ import annotations

import os
import socket
from collections.abc import Sequence

import torch

from m2f.trainer.errors import TrainingError
from m2f.trainer.ranks import Ranks


def selected_device() -> torch.device:
    """Return the GPU that `select_device` selected for this rank, else the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def select_device() -> torch.device:
    """Select the GPU with index LOCAL_RANK for this process and return it; the CPU if torch sees no GPU.

    Raises TrainingError if there is no GPU with that index.
    """
    if not torch.cuda.is_available():
        return torch.device("cpu")
    index, count = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    if index >= count:
        raise TrainingError(
            f"rank {os.environ.get('RANK', '0')} needs the GPU with index {index} (LOCAL_RANK), but torch sees only "
            f"{count} on this machine; start fewer ranks (cluster.num_workers), or list more GPUs in "
            "CUDA_VISIBLE_DEVICES"
        )
    torch.cuda.set_device(index)
    return torch.device("cuda", index)


def require_exclusive_device(device: torch.device, ranks: Ranks) -> None:
    """Raise TrainingError on all ranks if two of them use the same GPU. Every rank must call it."""
    name = ""
    if device.type == "cuda":
        name = f"{torch.cuda.get_device_properties(device).uuid} of {socket.gethostname()}"
    if problem := shared_device_problem(ranks.gather(name)):
        raise TrainingError(problem)


def shared_device_problem(names: Sequence[str]) -> str | None:
    """Return an error message if two ranks use the same GPU. `names` identify their GPUs; an empty name is the CPU."""
    for rank, name in enumerate(names):
        if name and (first := names.index(name)) != rank:
            return (
                f"ranks {first} and {rank} share one GPU ({name}), which NCCL does not support; lower "
                "cluster.num_workers, or raise cluster.num_gpus_per_worker above 0.5: a value below 1 leaves room for "
                "an evaluation actor, not for another rank"
            )
    return None
