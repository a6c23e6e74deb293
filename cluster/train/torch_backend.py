"""Torch backend of Ray Train that checks the GPUs of all workers before it creates the process group.

Ray counts GPUs from its configuration or from device files, so it does not notice a broken driver, or torch built
without CUDA. The workers then fail in NCCL, whose error does not name the node.
"""

from __future__ import annotations

import socket
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import ray
from ray.train.backend import Backend
from ray.train.torch import TorchConfig

from m2f.trainer.errors import TrainingError


@dataclass(frozen=True)
class WorkerGpu:
    """The GPU of one worker, as Ray and torch see it."""

    node: str
    assigned: str | None
    """Id of the GPU that Ray assigned to the worker; None if it has none."""
    is_visible: bool
    """Whether torch sees a GPU in the worker."""
    torch: str
    """Version of torch, and of CUDA if torch is built with it."""


def worker_gpu() -> WorkerGpu:
    """Return the GPU of the worker in which this function runs."""
    import torch

    assigned = [str(name) for name in ray.get_gpu_ids()]
    built = f"CUDA {torch.version.cuda}" if torch.version.cuda else "no CUDA"
    return WorkerGpu(
        node=socket.gethostname(),
        assigned=assigned[0] if assigned else None,
        is_visible=torch.cuda.is_available(),
        torch=f"torch {torch.__version__} with {built}",
    )


def invisible_gpu_problem(workers: Sequence[WorkerGpu]) -> str | None:
    """Return a message if torch sees no GPU in a worker to which Ray assigned one; otherwise None.

    `workers` are in the order of their ranks.
    """
    affected = [
        (rank, worker) for rank, worker in enumerate(workers) if worker.assigned is not None and not worker.is_visible
    ]
    if not affected:
        return None
    first = affected[0][1]
    names = [f"rank {rank} on node {worker.node} (GPU {worker.assigned})" for rank, worker in affected[:10]]
    rest = f" and {len(affected) - 10} more" if len(affected) > 10 else ""
    return (
        f"torch sees no GPU where Ray assigned one: {', '.join(names)}{rest}; {first.torch}. Run `nvidia-smi` and "
        f"`m2f doctor` on {first.node}; fix the driver, remove the node from the cluster, or train on the CPU with "
        "cluster.num_gpus_per_worker=0. Start nodes without a GPU with `ray start --num-gpus=0`"
    )


class CheckedTorchConfig(TorchConfig):
    """Ray's TorchConfig with `CheckedTorch` as its backend."""

    @property
    def backend_cls(self) -> type[Backend]:  # pyrefly: ignore[bad-override]  # Ray's private class is its type
        """Backend class that Ray Train instantiates: `CheckedTorch`, not that of `TorchConfig`."""
        return CheckedTorch


class CheckedTorch(Backend):
    """Ray's torch backend with a check of the GPUs before the ranks wait for each other."""

    share_cuda_visible_devices = True

    def __init__(self) -> None:
        self._torch = TorchConfig().backend_cls()

    def on_start(self, worker_group: Any, backend_config: Any) -> None:
        """Check the GPUs, and create the process group.

        Raises TrainingError if torch does not see an assigned GPU. Otherwise the ranks would hang or fail in NCCL.
        """
        if problem := invisible_gpu_problem(worker_group.execute(worker_gpu)):
            raise TrainingError(problem)
        self._torch.on_start(worker_group, backend_config)

    def on_training_start(self, worker_group: Any, backend_config: Any) -> None:
        """Call the hook of Ray's torch backend."""
        self._torch.on_training_start(worker_group, backend_config)

    def on_shutdown(self, worker_group: Any, backend_config: Any) -> None:
        """Call the hook of Ray's torch backend."""
        self._torch.on_shutdown(worker_group, backend_config)
