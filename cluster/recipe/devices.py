"""Where a run computes: devices, number of workers and precision where the recipe says `auto`.

`settle` is a pure function of the recipe, the devices that are there, and the checkpoint that a run goes on from.
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
from m2f.trainer.precision import Capability, sensible_precision

LARGE_ON_CPU = 512
"""Pixels of a side above which a CPU takes many seconds for an image."""
RANK_SHARE = 0.75
"""Of a GPU that evaluation actors share: more than half of it, so that Ray never puts two ranks on one."""
_UNKNOWN_TYPE: Capability = (8, 0)
_OLD_TYPES: Mapping[str, Capability] = {"V100": (7, 0), "T4": (7, 5), "P100": (6, 0), "P4": (6, 1), "K80": (3, 7)}
"""Compute capability of the GPUs without bf16, by Ray's name of their type."""


@dataclass(frozen=True)
class SeenGpu:
    """One GPU."""

    name: str
    capability: Capability


@dataclass(frozen=True)
class SeenDevices:
    """What can compute."""

    gpus: tuple[SeenGpu, ...] = ()
    found: str = "torch sees"
    """The beginning of a sentence about them."""
    cores: int = 0
    """CPU cores of this machine; 0 where they are not those that train."""
    may_grow: bool = False
    """Whether it is a cluster, which may get more."""

    @property
    def none(self) -> str:
        """The end of a sentence that there is no GPU."""
        return f"{self.found} no GPU" + (" now" if self.may_grow else "")


@dataclass(frozen=True)
class Settled:
    """A recipe without `auto`."""

    config: RunConfig
    line: str
    """What was decided, for the user."""
    warnings: tuple[str, ...] = ()
    hints: tuple[str, ...] = ()
    """What would make the run faster."""


def settle(config: RunConfig, seen: SeenDevices, stored: Precision | None = None, *, beside: bool = True) -> Settled:
    """Decide on devices, workers and precision.

    Args:
        config: the recipe; what it states stays, but workers beyond the GPUs that `auto` found.
        seen: the devices.
        stored: precision of the checkpoint that the run goes on from.
        beside: evaluations run while the training does; otherwise after it, on the same device.

    Raises:
        ConfigError: the recipe asks for GPUs that are not there, or for two ranks on one.
    """
    require_gpus(config, seen)
    warnings: list[str] = []
    workers, gpus = _training(config, seen, beside, warnings)
    evaluating = _evaluating(config, seen, workers, gpus, beside, warnings)
    precision = config.training.precision
    if precision == "auto":
        precision = stored or sensible_precision([gpu.capability for gpu in seen.gpus] if gpus else [])
    settled = replace(
        config,
        training=replace(config.training, precision=precision),
        cluster=replace(config.cluster, num_workers=workers, num_gpus_per_worker=gpus),
        evaluation=replace(config.evaluation, num_gpus_per_actor=evaluating),
    )
    return Settled(settled, describe(settled, seen), tuple(warnings), _hints(settled, seen))


def announced(settled: Settled) -> RunConfig:
    """The settled recipe, after its warnings and its line are printed."""
    for warning in settled.warnings:
        print_err(f"warning: {warning}")
    print_out(settled.line)
    for hint in settled.hints:
        print_out(f"hint: {hint}")
    return settled.config


def require_gpus(config: RunConfig, seen: SeenDevices) -> None:
    """Raise ConfigError where the recipe asks for GPUs that are not there, or for two ranks on one."""
    cluster = config.cluster
    asked = cluster.num_gpus_per_worker
    if asked == "auto" or not asked:
        return
    if asked <= 0.5 and cluster.max_workers > 1:
        raise ConfigError(
            f"cluster.num_gpus_per_worker is {asked:g} with {cluster.max_workers} workers, so that two ranks could get "
            "one GPU, which NCCL does not connect; set it above 0.5 (the rest is for an evaluation actor), or "
            "cluster.num_workers to 1"
        )
    if seen.may_grow:
        return
    needed = math.ceil(asked) * cluster.min_workers
    if needed > len(seen.gpus):
        raise ConfigError(
            f"cluster.num_gpus_per_worker is {asked:g} with {counted(cluster.min_workers, 'worker')}, and "
            f"{seen.found} {len(seen.gpus) or 'none'}; set cluster.num_workers and cluster.num_gpus_per_worker to "
            "auto, which take what is there, or num_gpus_per_worker to 0 to train on the CPU. If there are more GPUs, "
            "see nvidia-smi, CUDA_VISIBLE_DEVICES and `m2f doctor`"
        )


def describe(config: RunConfig, seen: SeenDevices) -> str:
    """The devices of a settled recipe in one line."""
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
    """For an evaluation without training: one GPU for each actor where there are any, else the CPU, and says so."""
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
    """The GPUs of a Ray cluster; `nodes` are the resources of its nodes."""
    found: list[SeenGpu] = []
    for resources in nodes:
        types = [name.partition(":")[2] for name in resources if name.startswith("accelerator_type:")]
        kind = types[0] if types else "GPU"
        found += [SeenGpu(kind, _OLD_TYPES.get(kind, _UNKNOWN_TYPE))] * int(resources.get("GPU", 0))
    return tuple(found)


def gpus_of_machine() -> tuple[SeenGpu, ...]:
    """The GPUs of this machine, as torch sees them."""
    import torch

    if not torch.cuda.is_available():
        return ()
    every = range(torch.cuda.device_count())
    return tuple(SeenGpu(torch.cuda.get_device_name(i), torch.cuda.get_device_capability(i)) for i in every)


def device_index(assigned: Sequence[Any], visible: str | None) -> int:
    """Which of the devices that CUDA shows to a rank is its own.

    Args:
        assigned: ids that Ray gave to the rank; of several the first counts.
        visible: CUDA_VISIBLE_DEVICES, where Ray lists the GPUs of all ranks on the machine.

    Raises:
        ConfigError: the rank's own is not among them.
    """
    own = str(assigned[0])
    shown = [name.strip() for name in visible.split(",")] if visible else []
    if not shown and own.isdecimal():
        return int(own)
    if own not in shown:
        raise ConfigError(
            f"Ray gave GPU {own} to a worker, but CUDA_VISIBLE_DEVICES is {visible!r}; leave this variable to Ray"
        )
    return shown.index(own)


def _no_gpu_to_evaluate(asked: float, seen: SeenDevices) -> str:
    return f"evaluation.num_gpus_per_actor is {asked:g}, but {seen.none}: evaluating on the CPU"


def _hints(config: RunConfig, seen: SeenDevices) -> tuple[str, ...]:
    """How a run on the CPU takes less time; `config` is settled."""
    if config.cluster.gpus_per_worker or not seen.cores:
        return ()
    hints: list[str] = []
    augment, training, workers = config.data.augment, config.training, config.cluster.max_workers
    if isinstance(augment, LargeScaleJitter) and augment.size > LARGE_ON_CPU:
        hints.append(
            f"images of {augment.size} x {augment.size} pixels (data.augment.size) are made for GPUs; for a trial on "
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
    """Workers, and GPUs of each."""
    cluster, asked, there = config.cluster, config.cluster.num_gpus_per_worker, len(seen.gpus)
    if asked == "auto" and not there:
        if seen.may_grow:
            warnings.append(
                f"{seen.none}: training on its CPUs. If it grows by GPUs, set cluster.num_gpus_per_worker to 1"
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
        may_share = asked != "auto" and asked <= 0.5  # two such ranks could get one GPU
        workers = 1 if may_share else min(room, config.training.global_batch)
    elif asked == "auto" and not seen.may_grow and cluster.max_workers > there:
        warnings.append(
            f"cluster.num_workers is {cluster.max_workers}, and {seen.found} {counted(there, 'GPU')}, one for each "
            f"worker: training with {counted(there, 'worker')} and the same global batch"
        )
        workers = there
    if asked != "auto":
        return workers, asked
    most = workers if isinstance(workers, int) else workers[1]
    return workers, _share_of_rank(config, most, there - most, beside)


def _kept_for_evaluation(config: RunConfig, there: int, beside: bool) -> int:
    """GPUs that no rank may take, as the recipe gives whole ones to evaluation actors."""
    evaluation = config.evaluation
    asked = evaluation.num_gpus_per_actor
    if not beside or not evaluation.sets or asked == "auto" or asked < 1:
        return 0
    return min(there - 1, math.ceil(evaluation.actors * asked))


def _share_of_rank(config: RunConfig, ranks: int, free: int, beside: bool) -> float:
    """Of a GPU, where `free` are left for evaluation actors.

    Raises ConfigError where the share that the recipe gives to an actor leaves too little.
    """
    evaluation = config.evaluation
    asked = evaluation.num_gpus_per_actor
    if not beside or not evaluation.sets or asked == 0 or (asked != "auto" and asked >= 1):
        return 1.0
    if asked == "auto":
        return RANK_SHARE if free < evaluation.actors else 1.0
    if free * int(1 / asked + 1e-6) >= evaluation.actors:  # an actor lies on one GPU
        return 1.0
    left = 1 - asked * math.ceil(evaluation.actors / ranks)
    if left <= (0.5 if ranks > 1 else 0):
        raise ConfigError(
            f"evaluation.num_gpus_per_actor is {asked:g}, and {counted(evaluation.actors, 'actor')} on the "
            f"{counted(ranks, 'GPU')} of the ranks would leave {max(0.0, left):g} of one to a rank, which needs more "
            "than half if there are several; set it to auto, or to 0 to evaluate on the CPU"
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
    """GPUs of each evaluation actor."""
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
            f"evaluation runs on the CPU: cluster.num_gpus_per_worker {gpus:g} leaves no GPU to it. Set that to auto "
            f"or {RANK_SHARE:g}, so that a rank and an evaluation actor share one"
        )
        return 0.0
    on_each = math.ceil(evaluation.actors / max(1, most))
    return math.floor(left / on_each * 1e4) / 1e4  # Ray counts in ten-thousandths
