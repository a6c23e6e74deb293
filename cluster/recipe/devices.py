"""Resolve `auto` in a recipe: devices, number of workers, and precision.

`settle` is a pure function of the recipe, the available devices, and the precision of the run's newest checkpoint.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from m2f.cluster.recipe.config import RunConfig
from m2f.cluster.terminal import print_err, print_out
from m2f.data_pipeline.config import LargeScaleJitter
from m2f.model.counted import counted
from m2f.model.errors import ConfigError
from m2f.trainer.config import Precision
from m2f.trainer.precision import Capability, default_precision

LARGE_ON_CPU = 512
"""Side of an image in pixels above which a CPU needs many seconds per image."""
RANK_SHARE = 0.75
"""Share of a GPU for a rank that shares it with actors. Above 0.5, so that Ray never puts two ranks on one GPU."""
_UNKNOWN_TYPE: Capability = (8, 0)
_OLD_TYPES: Mapping[str, Capability] = {"V100": (7, 0), "T4": (7, 5), "P100": (6, 0), "P4": (6, 1), "K80": (3, 7)}
"""Compute capability of GPUs without bf16, by Ray's name for their type."""


@dataclass(frozen=True)
class SeenGpu:
    """A GPU with its name and compute capability."""

    name: str
    capability: Capability


@dataclass(frozen=True)
class SeenDevices:
    """Devices that are available to a run."""

    gpus: tuple[SeenGpu, ...] = ()
    found: str = "torch sees"
    """Beginning of a sentence about the GPUs, for messages."""
    cores: int = 0
    """CPU cores of this machine; 0 if training runs elsewhere."""
    may_grow: bool = False
    """Whether the devices belong to a cluster that may grow."""

    @property
    def none(self) -> str:
        """Part of a sentence stating that there is no GPU, for messages."""
        return f"{self.found} no GPU" + (" now" if self.may_grow else "")


@dataclass(frozen=True)
class Settled:
    """A recipe with `auto` resolved, and messages for the user."""

    config: RunConfig
    line: str
    """Summary of the decisions."""
    warnings: tuple[str, ...] = ()
    hints: tuple[str, ...] = ()
    """Suggestions that make the run faster."""


def settle(config: RunConfig, seen: SeenDevices, stored: Precision | None = None, *, beside: bool = True) -> Settled:
    """Resolve `auto` for devices, workers and precision.

    Args:
        config: the recipe. Explicit settings stay, with two exceptions: if `num_gpus_per_worker` is `auto`, a larger
            `num_workers` is reduced to the number of GPUs, and actors evaluate on the CPU if there are no GPUs.
        seen: the available devices.
        stored: precision of the checkpoint that the run continues from; None for a new run.
        beside: whether evaluations run during training; otherwise they run after it, on the same device.

    Raises:
        ConfigError: the recipe requests GPUs that do not exist, or could put two ranks on one GPU.
    """
    require_gpus(config, seen)
    warnings: list[str] = []
    workers, gpus = _training(config, seen, beside, warnings)
    evaluating = _evaluating(config, seen, workers, gpus, beside, warnings)
    precision = config.training.precision
    if precision == "auto":
        precision = stored or default_precision([gpu.capability for gpu in seen.gpus] if gpus else [])
    settled = replace(
        config,
        training=replace(config.training, precision=precision),
        cluster=replace(config.cluster, num_workers=workers, num_gpus_per_worker=gpus),
        evaluation=replace(config.evaluation, num_gpus_per_actor=evaluating),
    )
    return Settled(settled, describe(settled, seen), tuple(warnings), _hints(settled, seen))


def announced(settled: Settled) -> RunConfig:
    """Print the warnings, the summary and the hints, and return the recipe."""
    for warning in settled.warnings:
        print_err(f"warning: {warning}")
    print_out(settled.line)
    for hint in settled.hints:
        print_out(f"hint: {hint}")
    return settled.config


def require_gpus(config: RunConfig, seen: SeenDevices) -> None:
    """Raise ConfigError if the recipe requests GPUs that do not exist, or could put two ranks on one GPU."""
    cluster = config.cluster
    asked = cluster.num_gpus_per_worker
    if asked == "auto" or not asked:
        return
    if asked <= 0.5 and cluster.max_workers > 1:
        raise ConfigError(
            f"cluster.num_gpus_per_worker is {asked:g} with {cluster.max_workers} workers, so two ranks could share "
            "one GPU, which NCCL does not support; set it above 0.5 (the rest is for an evaluation actor), or set "
            "cluster.num_workers to 1"
        )
    if seen.may_grow:
        return
    needed = math.ceil(asked) * cluster.min_workers
    if needed > len(seen.gpus):
        raise ConfigError(
            f"cluster.num_gpus_per_worker is {asked:g} with {counted(cluster.min_workers, 'worker')}, but "
            f"{seen.found} {len(seen.gpus) or 'none'}; set cluster.num_workers and cluster.num_gpus_per_worker to "
            "auto to use the available GPUs, or num_gpus_per_worker to 0 to train on the CPU. If there are more GPUs, "
            "check nvidia-smi, CUDA_VISIBLE_DEVICES and `m2f doctor`"
        )


def describe(config: RunConfig, seen: SeenDevices) -> str:
    """Return the devices of a settled recipe in one line."""
    cluster, evaluation = config.cluster, config.evaluation
    most = cluster.max_workers
    count = counted(most, "worker") if cluster.min_workers == most else f"{cluster.min_workers} to {most} workers"
    if cluster.gpus_per_worker:
        name = seen.gpus[0].name if seen.gpus else "GPU"
        where = f"{cluster.gpus_per_worker:g} {name} each" if cluster.gpus_per_worker != 1 else f"one {name} each"
        where = f"{count}, {where}"
    else:
        why = "as the recipe says" if seen.gpus else f"as {seen.none}"
        where = f"{count} on the CPU, {why}"
    rest = ""
    if evaluation.sets:
        own = evaluation.gpus_per_actor
        rest = f"; evaluation on {'the CPU' if not own else f'{own:g} GPU'}"
    return f"device: {where}; precision {config.training.precision}{rest}"


def evaluation_devices(config: RunConfig, seen: SeenDevices) -> Settled:
    """Resolve `auto` for an evaluation without training: one GPU per actor if there are any, otherwise the CPU.

    An explicit number of GPUs becomes 0, with a warning, if there are none and the cluster cannot grow.
    """
    evaluation = config.evaluation
    asked = evaluation.num_gpus_per_actor
    if asked == "auto":
        asked = 1.0 if seen.gpus else 0.0
    warnings: tuple[str, ...] = ()
    if asked and not seen.gpus and not seen.may_grow:
        warnings = (_no_gpu_to_evaluate(asked, seen),)
        asked = 0.0
    settled = replace(config, evaluation=replace(evaluation, num_gpus_per_actor=asked))
    where = f"{asked:g} {seen.gpus[0].name if seen.gpus else 'GPU'} per actor" if asked else "the CPU"
    return Settled(settled, f"device: {where}", warnings)


def gpus_of_nodes(nodes: Iterable[Mapping[str, float]]) -> tuple[SeenGpu, ...]:
    """Return the GPUs of a Ray cluster from the resources of its nodes."""
    found: list[SeenGpu] = []
    for resources in nodes:
        types = [name.partition(":")[2] for name in resources if name.startswith("accelerator_type:")]
        kind = types[0] if types else "GPU"
        found += [SeenGpu(kind, _OLD_TYPES.get(kind, _UNKNOWN_TYPE))] * int(resources.get("GPU", 0))
    return tuple(found)


def gpus_of_machine() -> tuple[SeenGpu, ...]:
    """Return the GPUs of this machine that torch sees."""
    import torch

    if not torch.cuda.is_available():
        return ()
    every = range(torch.cuda.device_count())
    return tuple(SeenGpu(torch.cuda.get_device_name(i), torch.cuda.get_device_capability(i)) for i in every)


def device_index(assigned: Sequence[Any], visible: str | None) -> int:
    """Return the index of a rank's own GPU among the devices that CUDA shows to it.

    Args:
        assigned: ids of the GPUs that Ray assigned to the rank; the first one is used.
        visible: value of CUDA_VISIBLE_DEVICES, in which Ray lists the GPUs of all ranks on the machine.

    Raises:
        ConfigError: the rank's GPU is not visible.
    """
    own = str(assigned[0])
    shown = [name.strip() for name in visible.split(",")] if visible else []
    if not shown and own.isdecimal():
        return int(own)
    if own not in shown:
        raise ConfigError(
            f"Ray assigned GPU {own} to a worker, but CUDA_VISIBLE_DEVICES is {visible!r}; let Ray set this variable"
        )
    return shown.index(own)


def _no_gpu_to_evaluate(asked: float, seen: SeenDevices) -> str:
    return f"evaluation.num_gpus_per_actor is {asked:g}, but {seen.none}: evaluating on the CPU"


def _hints(config: RunConfig, seen: SeenDevices) -> tuple[str, ...]:
    """Return hints that make a run on the CPU faster. `config` must be settled."""
    if config.cluster.gpus_per_worker or not seen.cores:
        return ()
    hints: list[str] = []
    augment, training, workers = config.data.augment, config.training, config.cluster.max_workers
    if isinstance(augment, LargeScaleJitter) and augment.size > LARGE_ON_CPU:
        hints.append(
            f"images of {augment.size} x {augment.size} pixels (data.augment.size) are meant for GPUs; for a trial on "
            "the CPU set data.augment.size=256"
        )
    if 2 * workers * training.threads <= seen.cores:
        hints.append(
            f"{counted(workers * training.threads, 'core')} of {seen.cores} will be busy; "
            f"training.threads={seen.cores // workers} uses the others"
        )
    return tuple(hints)


def _training(
    config: RunConfig, seen: SeenDevices, beside: bool, warnings: list[str]
) -> tuple[int | tuple[int, int], float]:
    """Return the number of workers, and the GPUs of each; add warnings to `warnings`."""
    cluster, asked, there = config.cluster, config.cluster.num_gpus_per_worker, len(seen.gpus)
    if asked == "auto" and not there:
        if seen.may_grow:
            warnings.append(
                f"{seen.none}: training on its CPUs. If GPUs are added, set cluster.num_gpus_per_worker to 1"
            )
        return 1 if cluster.num_workers == "auto" else cluster.num_workers, 0.0
    if asked != "auto" and not asked:
        if there:
            warnings.append(
                f"{counted(there, 'GPU')} ({seen.gpus[0].name}) stay idle, as cluster.num_gpus_per_worker is 0; set it "
                "to auto to train on them"
            )
        return 1 if cluster.num_workers == "auto" else cluster.num_workers, 0.0
    each = 1 if asked == "auto" else math.ceil(asked)
    room = max(1, (there - _kept_for_evaluation(config, there, beside)) // each)
    workers = cluster.num_workers
    if workers == "auto":
        may_share = asked != "auto" and asked <= 0.5  # because Ray could put two ranks on one GPU
        workers = 1 if may_share else min(room, config.training.global_batch)
    elif asked == "auto" and not seen.may_grow and cluster.max_workers > there:
        warnings.append(
            f"cluster.num_workers is {cluster.max_workers}, but {seen.found} {counted(there, 'GPU')}, and each worker "
            f"needs one: training with {counted(there, 'worker')} and the same global batch"
        )
        workers = there
    if asked != "auto":
        return workers, asked
    most = workers if isinstance(workers, int) else workers[1]
    return workers, _share_of_rank(config, most, there - most, beside)


def _kept_for_evaluation(config: RunConfig, there: int, beside: bool) -> int:
    """Return the number of GPUs reserved for evaluation actors, if the recipe assigns whole GPUs to them."""
    evaluation = config.evaluation
    asked = evaluation.num_gpus_per_actor
    if not beside or not evaluation.sets or asked == "auto" or asked < 1:
        return 0
    return min(there - 1, math.ceil(evaluation.actors * asked))


def _share_of_rank(config: RunConfig, ranks: int, free: int, beside: bool) -> float:
    """Return each rank's share of a GPU if `free` GPUs are left for evaluation actors.

    Raises ConfigError if the share of an actor in the recipe leaves too little for a rank.
    """
    evaluation = config.evaluation
    asked = evaluation.num_gpus_per_actor
    if not beside or not evaluation.sets or asked == 0 or (asked != "auto" and asked >= 1):
        return 1.0
    if asked == "auto":
        return RANK_SHARE if free < evaluation.actors else 1.0
    if free * int(1 / asked + 1e-6) >= evaluation.actors:  # an actor cannot span several GPUs
        return 1.0
    left = 1 - asked * math.ceil(evaluation.actors / ranks)
    if left <= (0.5 if ranks > 1 else 0):
        raise ConfigError(
            f"evaluation.num_gpus_per_actor is {asked:g}, and {counted(evaluation.actors, 'actor')} on the "
            f"{counted(ranks, 'GPU')} of the ranks would leave {max(0.0, left):g} of a GPU per rank. Several ranks "
            "need more than 0.5 each; set it to auto, or to 0 to evaluate on the CPU"
        )
    return min(RANK_SHARE, left)


def _evaluating(
    config: RunConfig,
    seen: SeenDevices,
    workers: int | tuple[int, int],
    gpus: float,
    beside: bool,
    warnings: list[str],
) -> float:
    """Return the GPUs of each evaluation actor; add warnings to `warnings`."""
    evaluation = config.evaluation
    asked = evaluation.num_gpus_per_actor
    if asked != "auto":
        lacks = bool(asked) and not seen.gpus and not seen.may_grow
        if lacks:
            warnings.append(_no_gpu_to_evaluate(asked, seen))
        return 0.0 if lacks else asked
    if not gpus:
        return 0.0
    most = workers if isinstance(workers, int) else workers[1]
    free = len(seen.gpus) - most * math.ceil(gpus)
    if not beside or not evaluation.sets or free >= evaluation.actors:
        return 1.0
    left = 1 - gpus if gpus < 1 else 0.0
    if not left:
        warnings.append(
            f"evaluation runs on the CPU: cluster.num_gpus_per_worker {gpus:g} leaves no GPU for it. Set that to auto "
            f"or {RANK_SHARE:g}, so that a rank and an evaluation actor share one"
        )
        return 0.0
    on_each = math.ceil(evaluation.actors / max(1, most))
    return math.floor(left / on_each * 1e4) / 1e4  # Ray counts resources in units of 1/10,000
