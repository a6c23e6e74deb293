"""Resolve `auto` in a recipe: devices, number of workers, precision and compilation.

`settle` is a pure function of the recipe, the available devices, and the choices of an earlier start of the run.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from m2f.cluster.recipe.config import RunConfig
from m2f.cluster.terminal import print_err, print_out
from m2f.data_pipeline.config import LargeScaleJitter, ScaleJitter
from m2f.model.errors import ConfigError
from m2f.model.format_count import format_count
from m2f.trainer.config import Precision
from m2f.trainer.precision import Capability, default_precision

LARGE_CPU_IMAGE_PX = 512
"""Side of an image in pixels above which a CPU needs many seconds per image."""
RANK_SHARE = 0.75
"""Share of a GPU for a rank that shares it with actors. It is above 0.5, because two ranks must not share a GPU."""
_DEFAULT_CAPABILITY: Capability = (8, 0)
_PRE_BF16_GPUS: Mapping[str, Capability] = {"V100": (7, 0), "T4": (7, 5), "P100": (6, 0), "P4": (6, 1), "K80": (3, 7)}
"""Compute capability of GPUs without bf16, by Ray's name for their type."""


@dataclass(frozen=True)
class AvailableGpu:
    """A GPU with its name and compute capability."""

    name: str
    capability: Capability


@dataclass(frozen=True)
class AvailableDevices:
    """Devices that are available to a run."""

    gpus: tuple[AvailableGpu, ...] = ()
    sentence_start: str = "torch sees"
    """Beginning of a sentence about the GPUs, for messages."""
    cores: int = 0
    """CPU cores of this machine; 0 if training runs elsewhere."""
    may_grow: bool = False
    """Whether the devices belong to a cluster that may grow."""
    has_compiler: bool = True
    """Whether this machine has the compiler that `training.compile` needs on GPUs."""

    @property
    def no_gpu_text(self) -> str:
        """Part of a sentence stating that there is no GPU, for messages."""
        return f"{self.sentence_start} no GPU" + (" now" if self.may_grow else "")


@dataclass(frozen=True)
class Settled:
    """A recipe with `auto` resolved, and messages for the user."""

    config: RunConfig
    line: str
    """Summary of the decisions."""
    warnings: tuple[str, ...] = ()
    hints: tuple[str, ...] = ()
    """Suggestions that make the run faster."""


@dataclass(frozen=True)
class StoredChoices:
    """Decisions made at an earlier start of a run; all None for a new run."""

    precision: Precision | None = None
    compile: bool | None = None
    pretrained: bool | None = None


def settle(
    config: RunConfig,
    devices: AvailableDevices,
    stored: StoredChoices = StoredChoices(),
    *,
    during_training: bool = True,
) -> Settled:
    """Resolve `auto` for devices, workers, precision and compilation.

    Args:
        config: the recipe. Explicit settings stay, with three exceptions. The maximum of a range of workers is reduced
            to the global batch. If `num_gpus_per_worker` is `auto`, a larger `num_workers` is reduced to the number of
            GPUs. If there are no GPUs, actors evaluate on the CPU.
        devices: the available devices.
        stored: choices of the run that is continued.
        during_training: whether evaluations run during training; otherwise they run after it, on the same device.

    Raises:
        ConfigError: the recipe requests GPUs that do not exist, could put two ranks on one GPU, or requires more
            workers than the global batch has images.
    """
    warnings: list[str] = []
    config = _limited_to_batch(config, warnings)
    require_gpus(config, devices)
    workers, gpus = _training_devices(config, devices, during_training, warnings)
    actor_gpus = _gpus_per_actor(config, devices, workers, gpus, during_training, warnings)
    precision = config.training.precision
    if precision == "auto":
        precision = stored.precision or default_precision([gpu.capability for gpu in devices.gpus] if gpus else [])
    compiles = _settled_compile(config, devices, gpus, stored, warnings)
    settled = replace(
        config,
        training=replace(config.training, precision=precision, compile=compiles),
        cluster=replace(config.cluster, num_workers=workers, num_gpus_per_worker=gpus),
        evaluation=replace(config.evaluation, num_gpus_per_actor=actor_gpus),
    )
    least, batch = settled.cluster.min_workers, settled.training.global_batch
    if least > batch:
        raise ConfigError(
            f"cluster.num_workers requires {format_count(least, 'worker')}, but training.global_batch is {batch}, and "
            "each worker needs at least one image per step; lower num_workers or raise global_batch"
        )
    return Settled(settled, describe(settled, devices), tuple(warnings), _hints(settled, devices))


def print_device_summary(settled: Settled) -> RunConfig:
    """Print the warnings, the summary and the hints, and return the recipe."""
    for warning in settled.warnings:
        print_err(f"warning: {warning}")
    print_out(settled.line)
    for hint in settled.hints:
        print_out(f"hint: {hint}")
    return settled.config


def require_gpus(config: RunConfig, devices: AvailableDevices) -> None:
    """Raise ConfigError if the recipe requests GPUs that do not exist, or could put two ranks on one GPU."""
    cluster = config.cluster
    requested = cluster.num_gpus_per_worker
    if requested == "auto" or not requested:
        return
    if requested <= 0.5 and cluster.max_workers > 1:
        raise ConfigError(
            f"cluster.num_gpus_per_worker is {requested:g} with {cluster.max_workers} workers, so two ranks could "
            "share one GPU, which NCCL does not support; set it above 0.5 (the rest is for an evaluation actor), or "
            "set cluster.num_workers to 1"
        )
    if devices.may_grow:
        return
    needed = math.ceil(requested) * cluster.min_workers
    if needed > len(devices.gpus):
        raise ConfigError(
            f"cluster.num_gpus_per_worker is {requested:g} with {format_count(cluster.min_workers, 'worker')}, but "
            f"{devices.sentence_start} {len(devices.gpus) or 'none'}; set cluster.num_workers and "
            "cluster.num_gpus_per_worker to auto to use the available GPUs, or num_gpus_per_worker to 0 to train on "
            "the CPU. If there are more GPUs, check nvidia-smi, CUDA_VISIBLE_DEVICES and `m2f doctor`"
        )


def describe(config: RunConfig, devices: AvailableDevices) -> str:
    """Return one line with the devices, precision and compilation of a settled recipe."""
    cluster, evaluation = config.cluster, config.evaluation
    max_workers = cluster.max_workers
    count = (
        format_count(max_workers, "worker")
        if cluster.min_workers == max_workers
        else f"{cluster.min_workers} to {max_workers} workers"
    )
    if cluster.gpus_per_worker:
        name = devices.gpus[0].name if devices.gpus else "GPU"
        where = f"{cluster.gpus_per_worker:g} {name} each" if cluster.gpus_per_worker != 1 else f"one {name} each"
        where = f"{count}, {where}"
    else:
        reason = "as the recipe says" if devices.gpus else f"as {devices.no_gpu_text}"
        where = f"{count} on the CPU, {reason}"
    rest = ""
    if evaluation.sets:
        actor_gpus = evaluation.gpus_per_actor
        rest = f"; evaluation on {'the CPU' if not actor_gpus else f'{actor_gpus:g} GPU'}"
    mode = f"precision {config.training.precision}{', compiled' if config.training.settled_compile else ''}"
    return f"device: {where}; {mode}{rest}"


def evaluation_devices(config: RunConfig, devices: AvailableDevices) -> Settled:
    """Resolve `auto` for an evaluation without training: one GPU per actor if there are any, otherwise the CPU.

    An explicit number of GPUs becomes 0, with a warning, if there are none and the cluster cannot grow.
    """
    evaluation = config.evaluation
    requested = evaluation.num_gpus_per_actor
    if requested == "auto":
        requested = 1.0 if devices.gpus else 0.0
    warnings: tuple[str, ...] = ()
    if requested and not devices.gpus and not devices.may_grow:
        warnings = (_no_gpu_to_evaluate(requested, devices),)
        requested = 0.0
    settled = replace(config, evaluation=replace(evaluation, num_gpus_per_actor=requested))
    where = f"{requested:g} {devices.gpus[0].name if devices.gpus else 'GPU'} per actor" if requested else "the CPU"
    return Settled(settled, f"device: {where}", warnings)


def cluster_gpus(nodes: Iterable[Mapping[str, float]]) -> tuple[AvailableGpu, ...]:
    """Return the GPUs of a Ray cluster from the resources of its nodes."""
    found: list[AvailableGpu] = []
    for resources in nodes:
        types = [name.partition(":")[2] for name in resources if name.startswith("accelerator_type:")]
        kind = types[0] if types else "GPU"
        found += [AvailableGpu(kind, _PRE_BF16_GPUS.get(kind, _DEFAULT_CAPABILITY))] * int(resources.get("GPU", 0))
    return tuple(found)


def local_gpus() -> tuple[AvailableGpu, ...]:
    """Return the GPUs of this machine that torch sees."""
    import torch

    if not torch.cuda.is_available():
        return ()
    indices = range(torch.cuda.device_count())
    return tuple(AvailableGpu(torch.cuda.get_device_name(i), torch.cuda.get_device_capability(i)) for i in indices)


def device_index(assigned: Sequence[Any], visible: str | None) -> int:
    """Return the index of a rank's own GPU among the devices that CUDA shows to it.

    Args:
        assigned: ids of the GPUs that Ray assigned to the rank; the first one is used.
        visible: value of CUDA_VISIBLE_DEVICES, in which Ray lists the GPUs of all ranks on the machine.

    Raises:
        ConfigError: the rank's GPU is not visible.
    """
    gpu_id = str(assigned[0])
    shown = [name.strip() for name in visible.split(",")] if visible else []
    if not shown and gpu_id.isdecimal():
        return int(gpu_id)
    if gpu_id not in shown:
        raise ConfigError(
            f"Ray assigned GPU {gpu_id} to a worker, but CUDA_VISIBLE_DEVICES is {visible!r}; let Ray set this variable"
        )
    return shown.index(gpu_id)


def _settled_compile(
    config: RunConfig, devices: AvailableDevices, gpus: float, stored: StoredChoices, warnings: list[str]
) -> bool:
    """Return whether to compile on `gpus` GPUs per worker; add a warning to `warnings` if a compiler is missing."""
    training = config.training
    if training.compile != "auto":
        return training.compile
    if isinstance(config.data.augment, ScaleJitter) or training.zero.stage == 3:
        return False  # images differ in size, or ZeRO 3 gathers weights in hooks that a compiled graph does not run
    if stored.compile is not None:
        return stored.compile
    if gpus and not devices.has_compiler:
        warnings.append(
            "training.compile is off because this machine has no C compiler, so steps are slower; install it "
            "(apt-get install gcc)"
        )
    return gpus > 0 and devices.has_compiler


def _no_gpu_to_evaluate(requested: float, devices: AvailableDevices) -> str:
    return f"evaluation.num_gpus_per_actor is {requested:g}, but {devices.no_gpu_text}: evaluating on the CPU"


def _hints(config: RunConfig, devices: AvailableDevices) -> tuple[str, ...]:
    """Return hints that make a run on the CPU faster. `config` must be settled."""
    if config.cluster.gpus_per_worker or not devices.cores:
        return ()
    hints: list[str] = []
    augment, training, workers = config.data.augment, config.training, config.cluster.max_workers
    if isinstance(augment, LargeScaleJitter) and augment.size > LARGE_CPU_IMAGE_PX:
        hints.append(
            f"images of {augment.size} x {augment.size} pixels (data.augment.size) are meant for GPUs; for a trial on "
            "the CPU set data.augment.size=256"
        )
    if 2 * workers * training.threads <= devices.cores:
        hints.append(
            f"{format_count(workers * training.threads, 'core')} of {devices.cores} will be busy; "
            f"training.threads={devices.cores // workers} uses the others"
        )
    return tuple(hints)


def _limited_to_batch(config: RunConfig, warnings: list[str]) -> RunConfig:
    """Return the recipe with the maximum of a range of workers reduced to the global batch; add a warning if it is.

    Otherwise a run that grows in a large cluster would start more ranks than a step has images, and fail.
    """
    cluster, batch = config.cluster, config.training.global_batch
    if not cluster.min_workers <= batch < cluster.max_workers:
        return config
    warnings.append(
        f"cluster.num_workers is [{cluster.min_workers}, {cluster.max_workers}], but training.global_batch is {batch}, "
        f"and each worker needs at least one image per step: training with at most {format_count(batch, 'worker')}"
    )
    return replace(config, cluster=replace(cluster, num_workers=(cluster.min_workers, batch)))


def _training_devices(
    config: RunConfig, devices: AvailableDevices, during_training: bool, warnings: list[str]
) -> tuple[int | tuple[int, int], float]:
    """Return the number of workers, and the GPUs of each; add warnings to `warnings`."""
    cluster, requested, num_gpus = config.cluster, config.cluster.num_gpus_per_worker, len(devices.gpus)
    if requested == "auto" and not num_gpus:
        if devices.may_grow:
            warnings.append(
                f"{devices.no_gpu_text}: training on its CPUs. If GPUs are added, set cluster.num_gpus_per_worker to 1"
            )
        return 1 if cluster.num_workers == "auto" else cluster.num_workers, 0.0
    if requested != "auto" and not requested:
        if num_gpus:
            warnings.append(
                f"{format_count(num_gpus, 'GPU')} ({devices.gpus[0].name}) stay idle, as cluster.num_gpus_per_worker "
                "is 0; set it to auto to train on them"
            )
        return 1 if cluster.num_workers == "auto" else cluster.num_workers, 0.0
    each = 1 if requested == "auto" else math.ceil(requested)
    room = max(1, (num_gpus - _reserved_for_evaluation(config, num_gpus, during_training)) // each)
    workers = cluster.num_workers
    if workers == "auto":
        may_share = requested != "auto" and requested <= 0.5  # with several ranks, Ray could put two on one GPU
        workers = 1 if may_share else min(room, config.training.global_batch)
    elif requested == "auto" and not devices.may_grow and cluster.max_workers > num_gpus:
        warnings.append(
            f"cluster.num_workers is {cluster.max_workers}, but {devices.sentence_start} "
            f"{format_count(num_gpus, 'GPU')}, and each worker needs one: training with "
            f"{format_count(num_gpus, 'worker')} and the same global batch"
        )
        workers = num_gpus
    if requested != "auto":
        return workers, requested
    max_workers = workers if isinstance(workers, int) else workers[1]
    return workers, _rank_gpu_share(config, max_workers, num_gpus - max_workers, during_training)


def _reserved_for_evaluation(config: RunConfig, num_gpus: int, during_training: bool) -> int:
    """Return the number of GPUs reserved for evaluation actors, if the recipe assigns whole GPUs to them."""
    evaluation = config.evaluation
    requested = evaluation.num_gpus_per_actor
    if not during_training or not evaluation.sets or requested == "auto" or requested < 1:
        return 0
    return min(num_gpus - 1, math.ceil(evaluation.actors * requested))


def _rank_gpu_share(config: RunConfig, ranks: int, free: int, during_training: bool) -> float:
    """Return each rank's share of a GPU if `free` GPUs are left for evaluation actors.

    Raises ConfigError if the share of an actor in the recipe leaves too little for a rank.
    """
    evaluation = config.evaluation
    requested = evaluation.num_gpus_per_actor
    if not during_training or not evaluation.sets or requested == 0 or (requested != "auto" and requested >= 1):
        return 1.0
    if requested == "auto":
        return RANK_SHARE if free < evaluation.actors else 1.0
    if free * int(1 / requested + 1e-6) >= evaluation.actors:  # an actor cannot span several GPUs
        return 1.0
    left = 1 - requested * math.ceil(evaluation.actors / ranks)
    if left <= (0.5 if ranks > 1 else 0):
        raise ConfigError(
            f"evaluation.num_gpus_per_actor is {requested:g}, and {format_count(evaluation.actors, 'actor')} on the "
            f"{format_count(ranks, 'GPU')} of the ranks would leave {max(0.0, left):g} of a GPU per rank. Several "
            "ranks need more than 0.5 each; set num_gpus_per_actor to auto, or to 0 to evaluate on the CPU"
        )
    return min(RANK_SHARE, left)


def _gpus_per_actor(
    config: RunConfig,
    devices: AvailableDevices,
    workers: int | tuple[int, int],
    gpus: float,
    during_training: bool,
    warnings: list[str],
) -> float:
    """Return the GPUs of each evaluation actor; add warnings to `warnings`."""
    evaluation = config.evaluation
    requested = evaluation.num_gpus_per_actor
    if requested != "auto":
        is_missing = bool(requested) and not devices.gpus and not devices.may_grow
        if is_missing:
            warnings.append(_no_gpu_to_evaluate(requested, devices))
        return 0.0 if is_missing else requested
    if not gpus:
        return 0.0
    max_workers = workers if isinstance(workers, int) else workers[1]
    free = len(devices.gpus) - max_workers * math.ceil(gpus)
    if not during_training or not evaluation.sets or free >= evaluation.actors:
        return 1.0
    left = 1 - gpus if gpus < 1 else 0.0
    if not left:
        warnings.append(
            f"evaluation runs on the CPU: cluster.num_gpus_per_worker {gpus:g} leaves no GPU for it. Set "
            f"num_gpus_per_worker to auto or {RANK_SHARE:g} to let a rank and an evaluation actor share one"
        )
        return 0.0
    actors_per_gpu = math.ceil(evaluation.actors / max(1, max_workers))
    return math.floor(left / actors_per_gpu * 1e4) / 1e4  # Ray counts resources in units of 1/10,000
