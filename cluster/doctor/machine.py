"""Checks of one machine: libraries, GPUs, collectives, memory, compiler, disks."""

from __future__ import annotations

import os
import platform
import shutil
import tempfile
import time
from datetime import timedelta
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from m2f.cluster.doctor.finding import Finding
from m2f.cluster.project import read_project
from m2f.cluster.ray_private import TESTED_VERSIONS
from m2f.cluster.recipe.config import RunConfig
from m2f.data_pipeline.storage.scratch import ScratchFolder
from m2f.model.format_count import format_count

GIB = 2**30
"""Bytes of a GiB, the unit in which sizes are reported."""
SHM_REQUIRED, SHM_RECOMMENDED = GIB // 4, 2 * GIB
"""Free bytes of shared memory, which holds the batches of all loader processes. Containers have 64 MiB by default."""
DISK_REQUIRED, DISK_RECOMMENDED = 1 * GIB, 10 * GIB
"""Free bytes for temporary files. Checkpoints are stored there until they are uploaded."""
REDUCE_TIMEOUT_S = 60.0
"""Seconds for the ranks to meet and to add. A longer limit would only delay the report of a broken connection."""


def check_versions() -> Finding:
    """Check Python and every library against the requirements of m2f."""
    project = read_project()
    python, declared = SpecifierSet(project.python), [Requirement(text) for text in project.dependencies]
    requirements = [r for r in declared if r.marker is None or r.marker.evaluate({"extra": "train"})]
    wrong = [] if platform.python_version() in python else [f"Python {platform.python_version()} (needs {python})"]
    found: dict[str, str] = {}
    for requirement in requirements:
        try:
            version = found[requirement.name] = metadata.version(requirement.name)
        except metadata.PackageNotFoundError:
            wrong.append(f"{requirement.name} is missing")
            continue
        if not requirement.specifier.contains(version, prereleases=True):
            wrong.append(f"{requirement.name} {version} (needs {requirement.specifier})")
    if wrong:
        remedy = "install m2f's requirements: pip install --constraint constraints.txt '.[train]'"
        return Finding("versions", "failed", "; ".join(wrong), remedy)
    shown = " ".join(f"{name} {found[name]}" for name in ("torch", "deepspeed", "ray", "mlflow") if name in found)
    detail = f"Python {platform.python_version()}, {shown}"
    if not SpecifierSet(TESTED_VERSIONS).contains(found["ray"], prereleases=True):
        remedy = (
            f"m2f uses private APIs of Ray and is tested with {TESTED_VERSIONS}: "
            f"pip install 'ray[default,train]{TESTED_VERSIONS}'"
        )
        return Finding("versions", "warning", detail, remedy)
    return Finding("versions", "ok", detail)


def check_gpus(config: RunConfig | None, expected: int | None) -> Finding:
    """Compare the number of GPUs that torch sees with the number that is needed.

    `expected` is the number that Ray counts on the node. If it is None, one GPU is needed if the recipe uses GPUs.
    """
    import torch

    count = torch.cuda.device_count()
    needed = expected
    if needed is None:
        cluster = None if config is None else config.cluster
        needed = 1 if cluster is not None and cluster.gpus_per_worker > 0 else 0
    if count < needed:
        remedy = f"check nvidia-smi, driver support for CUDA {torch.version.cuda}, and `--gpus all` of the container"
        return Finding("GPUs", "failed", f"torch sees {count}, but {needed} are needed", remedy)
    if not count:
        return Finding("GPUs", "ok", "none, and none needed" if config or expected == 0 else "none")
    first = torch.cuda.get_device_properties(0)
    return Finding("GPUs", "ok", f"{count} x {first.name}, {first.total_memory / GIB:.0f} GiB")


def check_collectives() -> Finding:
    """Run an all-reduce between processes of this machine: on all GPUs with NCCL, or in two processes with gloo."""
    import torch

    from m2f.cluster.train.launch import LaunchError, launch

    gpus = torch.cuda.device_count()
    name, ranks = ("NCCL", gpus) if gpus else ("gloo", 2)
    started = time.monotonic()
    try:
        with ScratchFolder("doctor") as folder:
            launch(all_reduce_once, (str(folder), bool(gpus)), ranks)
    except LaunchError as error:
        remedy = (
            "run again with NCCL_DEBUG=INFO; in a container try --shm-size=16g and --ipc=host"
            if gpus
            else "set GLOO_SOCKET_IFNAME to the network interface of this machine (see `ip address`)"
        )
        return Finding("collectives", "failed", f"{name}: {str(error).splitlines()[0]}", remedy)
    elapsed_s = time.monotonic() - started
    return Finding(
        "collectives",
        "ok",
        f"{name} all-reduce over {format_count(ranks, 'process', 'processes')}, {elapsed_s:.0f} s including startup",
    )


def all_reduce_once(folder: str, cuda: bool) -> None:
    """Run one process of an all-reduce. The processes find each other through a file in `folder`.

    Raises RuntimeError if the sum is wrong.
    """
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    rank, ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    device = torch.device("cuda", rank) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    store = dist.FileStore(f"{folder}/store", ranks)
    timeout = timedelta(seconds=REDUCE_TIMEOUT_S)
    dist.init_process_group("nccl" if cuda else "gloo", store=store, rank=rank, world_size=ranks, timeout=timeout)
    try:
        values = torch.full((2**18,), rank + 1.0, device=device)
        dist.all_reduce(values)
        if not bool((values == ranks * (ranks + 1) / 2).all()):
            raise RuntimeError("all-reduce returned a wrong sum")
    finally:
        dist.destroy_process_group()


def check_shared_memory() -> Finding:
    """Check the free space of /dev/shm."""
    folder = Path("/dev/shm")
    if not folder.is_dir():
        return Finding("shared memory", "skipped", f"no {folder} on {platform.system()}")
    free = shutil.disk_usage(folder).free
    detail = f"{_gib(free)} free in {folder}"
    remedy = "use docker run --shm-size=16g; on Kubernetes mount an emptyDir with medium: Memory at /dev/shm"
    if free < SHM_REQUIRED:
        return Finding("shared memory", "failed", detail + "; loader processes would crash", remedy)
    if free < SHM_RECOMMENDED:
        return Finding("shared memory", "warning", detail + "; only enough for small batches", remedy)
    return Finding("shared memory", "ok", detail)


def check_compiler(config: RunConfig | None) -> Finding:
    """Check for a compiler, which m2f's GPU kernels and `training.compile` need."""
    import torch

    from m2f.trainer.engine.compile import describe_compilers, find_compiler

    gpus = torch.cuda.is_available() or (config is not None and config.cluster.gpus_per_worker > 0)
    device = "cuda" if gpus else "cpu"
    path = find_compiler(device)
    if path is not None:
        return Finding("compiler", "ok", path)
    if config is not None and not gpus and not config.training.settled_compile:
        return Finding("compiler", "ok", "none, and none needed")
    user = "GPU kernels need" if gpus else "training.compile needs"
    state = "warning" if config is None and not gpus else "failed"
    return Finding("compiler", state, f"none found; {user} {describe_compilers(device)}", "apt-get install g++")


def check_op_cache() -> Finding:
    """Check that the folders in which Triton and torch.compile cache kernels are writable."""
    from m2f.trainer.engine.compile import compile_cache

    triton = Path(os.environ.get("TRITON_HOME", Path.home())) / ".triton" / "cache"
    folders = {
        "TRITON_CACHE_DIR": Path(os.environ.get("TRITON_CACHE_DIR", triton)),
        "TORCHINDUCTOR_CACHE_DIR": compile_cache(os.environ),
    }
    unwritable = {name: folder for name, folder in folders.items() if not _is_writable(folder)}
    if unwritable:
        detail = (
            f"cannot write to {' and '.join(map(str, unwritable.values()))}, the cache of GPU kernels and compiled code"
        )
        return Finding("op cache", "warning", detail, f"set {' and '.join(unwritable)} to a writable folder")
    return Finding("op cache", "ok", ", ".join(map(str, folders.values())))


def check_disk(config: RunConfig | None) -> Finding:
    """Check the free space for temporary files, for a local run folder and for the cache of shards."""
    needs = {Path(tempfile.gettempdir()): (DISK_REQUIRED, DISK_RECOMMENDED)}
    if config is not None:
        if "://" not in config.output:
            needs[_nearest_folder(Path(config.output))] = (DISK_REQUIRED, DISK_RECOMMENDED)
        if config.data.cache is not None:
            folder, size = _nearest_folder(Path(config.data.cache.folder)), int(config.data.cache.max_gb * 1e9)
            required, recommended = needs.get(folder, (0, 0))  # the folder may also hold temporary files or the run
            needs[folder] = (max(required, min(size, DISK_REQUIRED)), max(recommended, size))
    free = {folder: shutil.disk_usage(folder).free for folder in needs}
    detail = "; ".join(f"{_gib(free[folder])} free in {folder}" for folder in needs)
    if any(free[folder] < needed for folder, (needed, _) in needs.items()):
        return Finding("disk", "failed", detail, "free some space, or set TMPDIR to a larger disk")
    if any(free[folder] < recommended for folder, (_, recommended) in needs.items()):
        return Finding("disk", "warning", detail, "free some space; checkpoints are written here before their upload")
    return Finding("disk", "ok", detail)


def _nearest_folder(path: Path) -> Path:
    """Return the folder itself, or its closest parent that exists."""
    return next(folder for folder in (path, *path.parents) if folder.is_dir())


def _is_writable(folder: Path) -> bool:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return True
    except OSError:
        return False


def _gib(size: float) -> str:
    return f"{size / GIB:,.1f} GiB"
