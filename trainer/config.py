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
    PART,
    SECONDS,
    SECONDS_FROM_0,
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
    """Learning rate of all but the backbone, which the schedule multiplies."""
    weight_decay: Annotated[float, FROM_0] = 0.05
    """Decoupled weight decay: each update subtracts learning rate times this times the weight."""
    backbone_lr_multiplier: Annotated[float, FROM_0] = 0.1
    """Learning rate of the backbone, as a multiple of `lr`."""
    layer_decay: Annotated[float, PART] = 1.0
    """Learning rates of the backbone shrink by this factor per block, counted from its top; 1 treats all alike."""
    layer_decay_from: Literal["head", "top"] = "head"
    """Which rate is the full one. head: that of the head; the top block is one factor below it, and what precedes all
    blocks one below the lowest. top: that of the top block; what precedes all blocks has that of the lowest."""
    layer_decay_spared: Annotated[int, FROM_0] = 0
    """So many blocks at the top have the full rate, whatever `layer_decay`."""
    decay_everything: bool = False
    """Weight decay on norms, embeddings and positions as well."""
    betas: Annotated[tuple[float, float], BELOW_1] = (0.9, 0.999)
    """Decay rates of the averages of gradients and of their squares."""
    eps: Annotated[float, ABOVE_0] = 1e-8
    """Added to the root of the averaged squares, so that no division is by 0."""
    clip_norm: Annotated[float, FROM_0] = 0.01
    """Global L2 norm of all gradients over all groups and ranks; 0 switches clipping off."""


@dataclass(frozen=True, kw_only=True)
class PolySchedule(Section):
    """lr * (1 - step / max_steps) ** power (ADE20K, Cityscapes, Mapillary recipes)."""

    kind: Literal["poly"] = "poly"
    power: Annotated[float, FROM_0] = 0.9
    """Exponent: 1 falls linearly, less stays high for longer."""
    warmup_steps: Annotated[int, STEPS_FROM_0] = 0
    """Steps over which the learning rate rises linearly to that of the schedule."""


@dataclass(frozen=True, kw_only=True)
class MultiStepSchedule(Section):
    """lr multiplied by gamma at every milestone (COCO recipes)."""

    kind: Literal["multi_step"] = "multi_step"
    milestones: Annotated[tuple[int, ...], STEPS]
    """Steps at which the rate drops."""
    gamma: Annotated[float, ABOVE_0] = 0.1
    """Factor on the learning rate at every milestone."""
    warmup_steps: Annotated[int, STEPS_FROM_0] = 0
    """Steps over which the learning rate rises linearly to that of the schedule."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if list(self.milestones) != sorted(set(self.milestones)):
            raise ConfigError(
                f"training.schedule.milestones is {list(self.milestones)}; each must be above the one before it"
            )


@dataclass(frozen=True, kw_only=True)
class StagedPolySchedule(Section):
    """The backbone stands still while all else warms up, then warms up; both fall as `poly` from there."""

    kind: Literal["staged_poly"] = "staged_poly"
    power: Annotated[float, FROM_0] = 0.9
    """Exponent: 1 falls linearly, less stays high for longer."""
    warmup_steps: Annotated[int, STEPS_FROM_0] = 500
    """Steps over which the learning rate of all but the backbone rises linearly from 0."""
    backbone_warmup_steps: Annotated[int, STEPS_FROM_0] = 1000
    """Steps after these over which that of the backbone does."""


@dataclass(frozen=True, kw_only=True)
class CosineSchedule(Section):
    """The learning rate rises linearly, then falls to 0 as half a cosine."""

    kind: Literal["cosine"] = "cosine"
    warmup_steps: Annotated[int, STEPS_FROM_0] = 0
    """Steps over which it rises; the cosine begins behind them."""


ScheduleConfig = PolySchedule | MultiStepSchedule | StagedPolySchedule | CosineSchedule

Precision = Literal["fp32", "bf16_autocast", "fp16_autocast", "bf16", "fp16"]


@dataclass(frozen=True, kw_only=True)
class ZeroConfig(Section):
    """DeepSpeed ZeRO."""

    stage: Literal[0, 1, 2, 3] = 1
    """What is divided among the ranks: 0 nothing, 1 optimizer states, 2 gradients too, 3 weights too."""
    reduce_bucket_size: Annotated[int, FROM_1] = 12_500_000
    """Elements per gradient bucket; DeepSpeed's 5e8 is more than the whole model and prevents overlap."""
    overlap_comm: bool = True
    """Exchange gradients while the backward pass goes on; with several ranks and stage 1, 2 or 3."""
    param_persistence_threshold: Annotated[int, FROM_0] = 100_000
    """Stage 3: parameters with fewer elements stay whole on every rank."""
    offload_optimizer: bool = False
    """Keep the optimizer state in the host's memory and update there: slower, and 8 bytes per weight less on GPUs."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.offload_optimizer and self.stage == 0:
            raise ConfigError("training.zero.offload_optimizer needs training.zero.stage 1, 2 or 3; it is 0")


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig(Section):
    """When checkpoints are taken and how many are kept."""

    every_steps: Annotated[int, STEPS] = 5000
    """Steps from one checkpoint to the next; one more follows the last step."""
    keep: Annotated[int, FROM_1] = 3
    """Newest checkpoints kept; pinned ones (being evaluated) stay besides."""
    best_metric: str | None = None
    """Number of the evaluations, such as `val/PQ`, whose best checkpoint is kept as well."""
    upload_timeout_s: Annotated[float, SECONDS] = 3600.0
    """How long rank 0 waits for the files of all ranks before it gives a checkpoint and the attempt up."""


@dataclass(frozen=True, kw_only=True)
class EarlyStoppingConfig(Section):
    """Ends a run whose evaluations no longer get better. What is decided follows from the stored results alone."""

    metric: str
    """Number of the evaluations, such as `val/PQ`; the higher, the better."""
    patience: Annotated[int, FROM_1] = 5
    """So many evaluations in a row without a new best value end the run."""
    min_delta: Annotated[float, FROM_0] = 0.0
    """A value is a new best one if it is above the best by more than this; in per cent, as the metrics."""


@dataclass(frozen=True, kw_only=True)
class SpikeConfig(Section):
    """What is done when the loss leaves its usual range."""

    action: Literal["off", "report", "roll_back"] = "report"
    """report: an event; roll_back: go on from the last checkpoint before the spike, and leave its samples out."""
    window: Annotated[int, TWO_STEPS] = 200
    """Losses of so many steps are the usual range; no spike is seen before there are that many."""
    threshold: Annotated[float, ABOVE_0] = 10.0
    """A loss is too high when it exceeds the window's median by this many standard deviations, which are estimated
    from the median absolute deviation."""
    steps: Annotated[int, STEPS] = 3
    """So many steps in a row with too high a loss are a spike."""


@dataclass(frozen=True, kw_only=True)
class TrainingConfig(Section):
    """One training run."""

    max_steps: Annotated[int, STEPS_FROM_0] = 0
    """Optimizer steps; 0: as many as `max_epochs` makes."""
    max_epochs: Annotated[float, FROM_0] = 0.0
    """In place of `max_steps`: passes over the images of all data sets in `data.train`, as filters, limits and repeats
    leave them. The steps are counted at the start, and stored with the run. 0: not used."""
    early_stopping: EarlyStoppingConfig | None = None
    """When the run ends before its last step; None: never."""
    global_batch: Annotated[int, FROM_1] = 16
    """Images per optimizer step, over all ranks and micro-batches."""
    micro_batch: Annotated[int, FROM_1] = 2
    """Images per forward on one rank; accumulation follows from global_batch, world size and this."""
    precision: Precision | Literal["auto"] = "auto"
    """bf16_autocast, fp16_autocast: weights in fp32, matrix products in 16 bits. bf16, fp16: weights and gradients in
    16 bits too, with fp32 copies in the optimizer. fp16 and fp16_autocast scale the loss by what fits; fp16_autocast
    computes the pixel decoder in fp32, as the official code. Coordinates and losses stay in fp32. auto: bf16_autocast
    on GPUs that have bf16, fp16_autocast on older ones with tensor cores, else fp32; a run that goes on keeps its
    own."""
    pixel_decoder_fp32: bool = False
    """Compute the pixel decoder in fp32 under bf16_autocast too; slower."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    """AdamW: rates, decay and clipping."""
    schedule: ScheduleConfig = field(default_factory=PolySchedule)
    """How the learning rate changes over the steps."""
    zero: ZeroConfig = field(default_factory=ZeroConfig)
    """What DeepSpeed divides among the ranks."""
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    """When checkpoints are taken and which are kept."""
    ema_decay: Annotated[float, BELOW_1] = 0.0
    """Decay of the moving average of the weights, which is then what evaluations use; 0 keeps no average."""
    log_every_steps: Annotated[int, STEPS] = 20
    """Steps from one point of the curves, and line of the log, to the next."""
    spikes: SpikeConfig = field(default_factory=SpikeConfig)
    """What is done when the loss leaves its usual range."""
    max_skipped_steps: Annotated[int, STEPS_FROM_0] = 20
    """Steps in a row with non-finite gradients after which the run stops."""
    deterministic: bool = False
    """Deterministic kernels on GPU (slower); CPU runs are deterministic in any case."""
    compile: bool = False
    """Compile backbone, pixel decoder and transformer decoder with torch.compile, each into one graph: fewer kernels.
    The first step takes minutes longer, which is no stall. Images must have one size; not with ZeRO stage 3. Needs a
    C++ compiler (g++), on GPUs a C compiler."""
    threads: Annotated[int, FROM_1] = 1
    """Torch threads per rank on CPU."""
    collective_timeout_s: Annotated[float, SECONDS] = 1200.0
    """Seconds that a rank waits for the others before the attempt ends. With data or the run folder in S3 more than
    `storage.patience_s` and `stall_timeout_s` together, as one rank may wait so long for the storage."""
    stall_timeout_s: Annotated[float, SECONDS_FROM_0] = 300.0
    """A rank that spends this long in one phase of a step (data, forward pass, update, ...) stalls the run: the stacks
    of all ranks are written and the attempt ends. Less than collective_timeout_s, or that ends it first and says less;
    0 switches it off."""

    @property
    def settled_precision(self) -> Precision:
        """The precision, once it is decided on. Raises ValueError for `auto`, which no part of a rank may guess at."""
        if self.precision == "auto":
            raise ValueError("training.precision is auto; decide on it before a model, an engine or a plan is made")
        return self.precision

    def __post_init__(self) -> None:
        super().__post_init__()
        if bool(self.max_steps) == bool(self.max_epochs):
            both = f"both training.max_steps ({self.max_steps}) and training.max_epochs ({self.max_epochs:g}) are given"
            problem = both if self.max_steps else "neither training.max_steps nor training.max_epochs is given"
            raise ConfigError(f"{problem}; give one of them, and leave the other one out or at 0")
        if self.precision in ("bf16", "fp16") and self.zero.stage == 0:
            raise ConfigError(
                f"training.precision {self.precision} needs training.zero.stage 1, 2 or 3, which keep fp32 copies of "
                "the weights; raise the stage, or set the precision to bf16_autocast"
            )
        if self.pixel_decoder_fp32 and self.precision in ("bf16", "fp16"):
            raise ConfigError(
                f"training.pixel_decoder_fp32 needs weights in fp32, and training.precision {self.precision} has them "
                f"in 16 bits; set the precision to {self.precision}_autocast"
            )
        if self.compile and self.zero.stage == 3:
            raise ConfigError(
                "training.compile needs training.zero.stage 0, 1 or 2; it is 3, which gathers weights in hooks that a "
                "graph does not run. Lower the stage, or set training.compile to false"
            )
