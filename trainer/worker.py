"""Run one rank as a process: set up determinism, device and process group, then train."""

from __future__ import annotations

import os
import random
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from io import StringIO

import numpy as np
import torch
import torch.distributed as dist

from m2f.model.cpu_products import fast_cpu_products
from m2f.trainer.data import OpenData, open_shards
from m2f.trainer.device import select_device
from m2f.trainer.engine.compile import keep_compiled_code
from m2f.trainer.errors import TrainingError
from m2f.trainer.job import Control, ManualControl, TrainJob
from m2f.trainer.loop import train
from m2f.trainer.memory.allocator import enable_expandable_segments
from m2f.trainer.reporting import LogReporter, Reporter
from m2f.trainer.state import TrainState

_LOOPBACK = ("127.0.0.1", "localhost")
_REQUIRED = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def run_worker(
    job: TrainJob,
    reporter: Reporter | None = None,
    control: Control | None = None,
    open_data: OpenData = open_shards,
) -> TrainState:
    """Train as the rank given by RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT; LOCAL_RANK defaults to RANK.

    Without a `reporter`, rank 0 prints. An existing process group (Ray Train) is used unchanged. If none of the four
    variables is set, the process is the only rank. Raises TrainingError if only some of them are set, and the errors of
    `train`.
    """
    device = prepare_process(job)
    with process_group(device, job.training.collective_timeout_s), fast_cpu_products(device):
        log = LogReporter(job.training.max_steps, sys.stdout if dist.get_rank() == 0 else StringIO())
        return train(job, reporter or log, control or ManualControl(), open_data)


def prepare_process(job: TrainJob) -> torch.device:
    """Set seeds, threads, allocator, compile cache and deterministic kernels; return this rank's device."""
    random.seed(job.seed)
    np.random.seed(job.seed % 2**32)
    torch.manual_seed(job.seed)
    enable_expandable_segments(os.environ)
    keep_compiled_code(os.environ)
    if not torch.cuda.is_available():
        torch.set_num_threads(job.training.threads)
    elif job.training.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    return select_device()


@contextmanager
def process_group(device: torch.device, timeout_s: float) -> Iterator[None]:
    """Provide the default process group during the context.

    An existing group is used. Otherwise the group is set up from the environment, with NCCL on GPUs and gloo on CPUs.
    After an error an NCCL group is not destroyed: destroying it waits for operations that the failed rank never enters,
    and the error would never be raised.
    """
    if dist.is_initialized():
        yield
        return
    _complete_environment()
    backend = "nccl" if device.type == "cuda" else "gloo"
    timeout = timedelta(seconds=timeout_s)
    if _is_one_machine():
        rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        store = _loopback_store(rank, world_size, timeout)
        dist.init_process_group(backend, timeout=timeout, store=store, rank=rank, world_size=world_size)
    else:
        dist.init_process_group(backend, timeout=timeout)
    try:
        yield
    except BaseException:
        if backend != "nccl":
            _destroy_group()
        raise
    _destroy_group()


def _destroy_group() -> None:
    """Destroy the process group, through DeepSpeed if it has adopted the group and would reuse it in the next run."""
    comm = sys.modules.get("deepspeed.comm")
    if comm is not None and comm.is_initialized():
        comm.destroy_process_group()
    else:
        dist.destroy_process_group()


def _is_one_machine() -> bool:
    """Return whether all ranks connect through loopback, without the store of torchrun's agent."""
    return os.environ["MASTER_ADDR"] in _LOOPBACK and "TORCHELASTIC_USE_AGENT_STORE" not in os.environ


def _loopback_store(rank: int, world_size: int, timeout: timedelta) -> dist.TCPStore:
    """Create the rendezvous store on loopback only. Torch's own store listens on all interfaces without a password."""
    host, port = _LOOPBACK[0], int(os.environ["MASTER_PORT"])
    if rank:
        return dist.TCPStore(host, port, world_size, is_master=False, timeout=timeout)
    listener = socket.create_server((host, port))
    port = listener.getsockname()[1]
    # The store now owns the descriptor.
    return dist.TCPStore(
        host, port, world_size, is_master=True, timeout=timeout, master_listen_fd=listener.detach(), use_libuv=False
    )


def _complete_environment() -> None:
    present = [name for name in _REQUIRED if name in os.environ]
    if not present:
        os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    elif len(present) < len(_REQUIRED):
        missing = ", ".join(name for name in _REQUIRED if name not in os.environ)
        raise TrainingError(f"the environment has {', '.join(present)}, but not {missing}; set all four or none")
    os.environ.setdefault("LOCAL_RANK", os.environ["RANK"])
