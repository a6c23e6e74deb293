"""Settings of training (standard library only)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal

from m2f.model.errors import ConfigError
from m2f.model.limits import (
    ABOVE_0,
    BELOW_1,
    FROM_0,
    FROM_1,
    RISING_STEPS,
    SECONDS,
    SECONDS_FROM_0,
    SHARE_ABOVE_0,
    STEPS,
    STEPS_FROM_0,
    Range,
    Section,
)

TWO_STEPS = Range(2, unit="steps")


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig(Section):
    """AdamW with the official parameter groups: no decay on norms and embeddings, a lower rate on the backbone."""

    lr: Annotated[float, ABOVE_0] = 1e-4
    """Learning rate of everything but the backbone. The schedule multiplies it."""
    weight_decay: Annotated[float, FROM_0] = 0.05
    """Decoupled weight decay: each update subtracts learning rate times this value times the weight."""
    backbone_lr_multiplier: Annotated[float, FROM_0] = 0.1
    """Learning rate of the backbone, as a multiple of `lr`."""
    layer_decay: Annotated[float, SHARE_ABOVE_0] = 1.0
    """Factor on the backbone's learning rate per block, counted from the top; 1: all blocks have the same rate."""
    layer_decay_from: Literal["head", "top"] = "head"
    """Part of the model that has the full rate. head: the head; the top block is one factor below it, and layers before
    the first block are one factor below the first block. top: the top block; layers before the first block have the
    rate of the first block."""
    layer_decay_spared: Annotated[int, FROM_0] = 0
    """Number of top blocks that keep the full rate regardless of `layer_decay`."""
    decay_everything: bool = False
    """Apply weight decay to norms, embeddings and position tables as well."""
    betas: Annotated[tuple[float, float], BELOW_1] = (0.9, 0.999)
    """Decay rates of AdamW's running averages of the gradients and of their squares."""
    eps: Annotated[float, ABOVE_0] = 1e-8
    """Added to the square root of the averaged squared gradients, to avoid a division by 0."""
    clip_norm: Annotated[float, FROM_0] = 0.01
    """Largest global L2 norm of the gradients, over all groups and ranks; 0 switches clipping off."""


@dataclass(frozen=True, kw_only=True)
class PolySchedule(Section):
    """lr * (1 - step / max_steps) ** power (ADE20K, Cityscapes, Mapillary recipes)."""

    kind: Literal["poly"] = "poly"
    power: Annotated[float, FROM_0] = 0.9
    """Exponent: 1 decreases linearly; smaller values keep the rate high for longer."""
    warmup_steps: Annotated[int, STEPS_FROM_0] = 0
    """Steps over which the learning rate rises linearly to that of the schedule."""


@dataclass(frozen=True, kw_only=True)
class MultiStepSchedule(Section):
    """The learning rate is multiplied by `gamma` at every milestone (COCO recipes)."""

    kind: Literal["multi_step"] = "multi_step"
    milestones: Annotated[tuple[int, ...], RISING_STEPS]
    """Steps at which the learning rate drops."""
    gamma: Annotated[float, ABOVE_0] = 0.1
    """Factor on the learning rate at every milestone."""
    warmup_steps: Annotated[int, STEPS_FROM_0] = 0
    """Steps over which the learning rate rises linearly to that of the schedule."""


@dataclass(frozen=True, kw_only=True)
class StagedPolySchedule(Section):
    """The backbone keeps learning rate 0 while the rest of the model warms up, then warms up too.

    After its warm-up, each of the two decreases as `poly`.
    """

    kind: Literal["staged_poly"] = "staged_poly"
    power: Annotated[float, FROM_0] = 0.9
    """Exponent: 1 decreases linearly; smaller values keep the rate high for longer."""
    warmup_steps: Annotated[int, STEPS_FROM_0] = 500
    """Steps over which the learning rate of everything but the backbone rises linearly from 0."""
    backbone_warmup_steps: Annotated[int, STEPS_FROM_0] = 1000
    """Steps, counted from the end of `warmup_steps`, over which the backbone's learning rate rises linearly from 0."""


@dataclass(frozen=True, kw_only=True)
class CosineSchedule(Section):
    """The learning rate rises linearly, then falls to 0 along half a cosine."""

    kind: Literal["cosine"] = "cosine"
    warmup_steps: Annotated[int, STEPS_FROM_0] = 0
    """Steps over which the learning rate rises; the cosine starts after them."""


ScheduleConfig = PolySchedule | MultiStepSchedule | StagedPolySchedule | CosineSchedule

Precision = Literal["fp32", "bf16_autocast", "fp16_autocast", "bf16", "fp16"]


@dataclass(frozen=True, kw_only=True)
class ZeroConfig(Section):
    """DeepSpeed ZeRO, which partitions training state among the ranks."""

    stage: Literal[0, 1, 2, 3] = 1
    """What is partitioned among the ranks. 0: nothing; 1: optimizer states; 2: also gradients; 3: also weights."""
    reduce_bucket_size: Annotated[int, FROM_1] = 12_500_000
    """Elements per gradient bucket. DeepSpeed's default of 5e8 exceeds the whole model and prevents overlap."""
    overlap_comm: bool = True
    """Exchange gradients during the backward pass; takes effect with several ranks and stage 1, 2 or 3."""
    param_persistence_threshold: Annotated[int, FROM_0] = 100_000
    """Stage 3: parameters with fewer elements than this are not partitioned."""
    offload_optimizer: bool = False
    """Keep the optimizer state in host memory and update there: slower, but saves 12 bytes of GPU memory per weight,
    in total over all ranks."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.offload_optimizer and self.stage == 0:
            raise ConfigError("training.zero.offload_optimizer needs training.zero.stage 1, 2 or 3; it is 0")


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig(Section):
    """Number of steps between checkpoints, and number of checkpoints that are kept."""

    every_steps: Annotated[int, STEPS] = 5000
    """Steps between checkpoints. Another one is saved after the last step."""
    keep: Annotated[int, FROM_1] = 3
    """Number of newest checkpoints to keep. Pinned ones (being evaluated) are kept in addition."""
    best_metric: str | None = None
    """Evaluation metric, such as `val/PQ`, whose best checkpoint is kept in addition."""
    upload_timeout_s: Annotated[float, SECONDS] = 3600.0
    """Seconds that rank 0 waits for each rank's files before it abandons the checkpoint and the attempt fails."""


@dataclass(frozen=True, kw_only=True)
class EarlyStoppingConfig(Section):
    """Ends a run whose evaluations no longer improve. The decision depends only on stored evaluation results."""

    metric: str
    """Evaluation metric, such as `val/PQ`; higher is better."""
    patience: Annotated[int, FROM_1] = 5
    """Number of consecutive evaluations without a new best value after which the run ends."""
    min_delta: Annotated[float, FROM_0] = 0.0
    """A value is a new best only if it exceeds the best one by more than this; in per cent, like the metrics."""


@dataclass(frozen=True, kw_only=True)
class SpikeConfig(Section):
    """Detection of loss spikes, and the reaction to them."""

    action: Literal["off", "report", "roll_back"] = "report"
    """off: no detection; report: log a notice; roll_back: resume from the last checkpoint before the spike and skip the
    samples of the spike."""
    window: Annotated[int, TWO_STEPS] = 200
    """Number of most recent losses that define the usual range. No spike is detected before there are that many."""
    threshold: Annotated[float, ABOVE_0] = 10.0
    """A loss is too high if it exceeds the window's median by more than this many standard deviations, estimated from
    the median absolute deviation."""
    steps: Annotated[int, STEPS] = 3
    """Number of consecutive steps with too high a loss that count as a spike."""


@dataclass(frozen=True, kw_only=True)
class TrainingConfig(Section):
    """Number of steps, batch sizes, precision, optimizer, checkpoints and reactions to failures."""

    max_steps: Annotated[int, STEPS_FROM_0] = 0
    """Number of optimizer steps; 0: derived from `max_epochs`."""
    max_epochs: Annotated[float, FROM_0] = 0.0
    """Alternative to `max_steps`: passes over the images of all data sets in `data.train`, after filters, limits and
    repeats. The number of steps is computed at the start and stored with the run. 0: not used."""
    early_stopping: EarlyStoppingConfig | None = None
    """Condition for ending the run before its last step; None: never."""
    global_batch: Annotated[int, FROM_1] = 16
    """Images per optimizer step, over all ranks and micro-batches."""
    micro_batch: Annotated[int, FROM_1] = 2
    """Images per forward pass on one rank. Accumulation follows from `global_batch`, the number of ranks and this."""
    precision: Precision | Literal["auto"] = "auto"
    """bf16_autocast, fp16_autocast: weights in fp32, matrix products in 16 bits. bf16, fp16: weights and gradients in
    16 bits too, with fp32 copies in the optimizer. fp16 and fp16_autocast scale the loss dynamically. fp16_autocast
    computes the pixel decoder in fp32, as the official code does. Coordinates and losses always stay in fp32. auto:
    bf16_autocast on GPUs that support bf16, fp16_autocast on older GPUs with tensor cores, else fp32. A resumed run
    keeps the precision that it started with."""
    pixel_decoder_fp32: bool = False
    """Compute the pixel decoder in fp32 under bf16_autocast too; slower."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    """AdamW: learning rates, weight decay and clipping."""
    schedule: ScheduleConfig = field(default_factory=PolySchedule)
    """How the learning rate changes over the steps."""
    zero: ZeroConfig = field(default_factory=ZeroConfig)
    """What DeepSpeed partitions among the ranks."""
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    """When checkpoints are saved, and which ones are kept."""
    ema_decay: Annotated[float, BELOW_1] = 0.0
    """Decay of the moving average of the weights, which evaluations then use; 0 keeps no average."""
    log_every_steps: Annotated[int, STEPS] = 20
    """Steps between two log lines and points of the curves."""
    spikes: SpikeConfig = field(default_factory=SpikeConfig)
    """Detection of loss spikes, and the reaction to them."""
    max_skipped_steps: Annotated[int, STEPS_FROM_0] = 20
    """Number of consecutive skipped steps (non-finite gradients) that are tolerated; one more ends the run."""
    deterministic: bool = False
    """Use deterministic kernels on GPUs (slower). CPU runs are always deterministic."""
    compile: bool | Literal["auto"] = "auto"
    """Compile backbone, pixel decoder and transformer decoder with torch.compile, each into one graph with fewer
    kernels. The first step takes minutes longer; the watchdog allows for that. All images must have the same size. Not
    supported with ZeRO stage 3. Requires a C++ compiler (g++) on CPUs and a C compiler on GPUs. `auto`: compile on GPUs
    if these conditions hold. A resumed run keeps its choice."""
    threads: Annotated[int, FROM_1] = 1
    """Torch threads per rank on CPUs."""
    collective_timeout_s: Annotated[float, SECONDS] = 1200.0
    """Seconds that a rank waits for the others before the attempt ends. If data or the run folder are in S3, set it
    above the sum of `storage.patience_s` and `stall_timeout_s`, since a rank may wait that long for the storage."""
    stall_timeout_s: Annotated[float, SECONDS_FROM_0] = 300.0
    """Longest time in seconds that a rank may spend in one phase of a step (data, forward pass, update, ...). If a rank
    takes longer, the run has stalled: the stacks of all ranks are written and the attempt ends. Must be less than
    `collective_timeout_s`, which would otherwise end the attempt first, with less information. 0 switches it off."""

    @property
    def settled_precision(self) -> Precision:
        """The resolved precision. Raises ValueError for `auto`, which must be resolved once for all parts of a rank."""
        if self.precision == "auto":
            raise ValueError("training.precision is auto; resolve it before building a model, engine or memory plan")
        return self.precision

    @property
    def settled_compile(self) -> bool:
        """Whether to compile. False for `auto`, the value until it is resolved for a device."""
        return self.compile is True

    @property
    def used_metrics(self) -> dict[str, str]:
        """Evaluation metrics that the run depends on, by the setting that names each."""
        named = {"training.checkpoint.best_metric": self.checkpoint.best_metric}
        if self.early_stopping is not None:
            named["training.early_stopping.metric"] = self.early_stopping.metric
        return {setting: metric for setting, metric in named.items() if metric is not None}

    def __post_init__(self) -> None:
        super().__post_init__()
        if bool(self.max_steps) == bool(self.max_epochs):
            both = f"both training.max_steps ({self.max_steps}) and training.max_epochs ({self.max_epochs:g}) are set"
            problem = both if self.max_steps else "neither training.max_steps nor training.max_epochs is set"
            raise ConfigError(f"{problem}; set one of them, and leave the other one unset or at 0")
        if self.precision in ("bf16", "fp16") and self.zero.stage == 0:
            raise ConfigError(
                f"training.precision {self.precision} needs training.zero.stage 1, 2 or 3, which keep fp32 copies of "
                "the weights; raise the stage, or set the precision to bf16_autocast"
            )
        if self.pixel_decoder_fp32 and self.precision in ("bf16", "fp16"):
            raise ConfigError(
                f"training.pixel_decoder_fp32 needs fp32 weights, but training.precision {self.precision} keeps them "
                f"in 16 bits; set the precision to {self.precision}_autocast"
            )
        if self.settled_compile and self.zero.stage == 3:
            raise ConfigError(
                "training.compile needs training.zero.stage 0, 1 or 2; it is 3, which gathers weights in hooks that a "
                "compiled graph does not run. Lower the stage, or set training.compile to false"
            )
