"""Adapter for DeepSpeed: ZeRO stages 0 to 3 around our own AdamW, with gradients of the summed global loss."""

from __future__ import annotations

import logging
import math
import os
from argparse import Namespace
from collections.abc import Mapping, Sequence
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from m2f.data_pipeline.order.order import step_positions
from m2f.data_pipeline.transforms.collate import Batch
from m2f.model.loss.criterion import Losses, Normalizers
from m2f.trainer.config import TrainingConfig
from m2f.trainer.engine.ema import WeightAverage
from m2f.trainer.engine.module import TrainingModule
from m2f.trainer.engine.offload import OffloadedScalars
from m2f.trainer.engine.param_groups import build_param_groups
from m2f.trainer.engine.safe_load import safe_loads
from m2f.trainer.engine.skipping import DeviceSkips, device_can_decide
from m2f.trainer.errors import TrainingError

_LOSS_SCALE = "loss_scale"
"""Key of our own state in DeepSpeed's files."""
_MAX_GATHERED_ELEMENTS = 50_000_000  # elements; 200 MB of fp32 while ZeRO-3 weights are consolidated


@dataclass(frozen=True)
class StepResult:
    """Outcome of one optimizer step; equal on all ranks."""

    applied: bool
    """False if a gradient was not finite; weights and optimizer state are then unchanged."""
    grad_norm: float
    """Global L2 norm before clipping; infinity if the step was skipped."""


class Engine:
    """One rank's part of the weights, gradients and optimizer state.

    Per step, call `accumulate` for every micro-batch, then `set_lr_factor` and `finish_step`. Instead of `finish_step`,
    a caller may call `update` and, before the next `update`, `finish_update`. Raises TrainingError if the settings do
    not suit the number of ranks or the device. The process group must exist.
    """

    def __init__(
        self, module: TrainingModule, training: TrainingConfig, device: torch.device, universal: bool = False
    ) -> None:
        """Set `universal` if `load` will read the output of `to_universal`."""
        self.world_size = dist.get_world_size()
        check_world_size(training, self.world_size)
        check_device(training, device)
        self.device = device
        self.stage = training.zero.stage
        self._clip_norm = training.optimizer.clip_norm
        self.module = module.to(device)
        self.runs_ahead = device.type == "cuda" and module.loss_scale is None
        """Whether `finish_update` may be delayed until after the next step's backward pass. False with loss scaling,
        because `finish_update` changes the scale, and on CPUs, because it brings no gain."""
        self._has_master_weights = training.settled_precision in ("bf16", "fp16")
        self._adamw = _build_adamw(module, training)
        self._settings = [{k: v for k, v in group.items() if k != "params"} for group in self._adamw.param_groups]
        self._engine: Any = _initialize(module, self._adamw, deepspeed_config(training, self.world_size, universal))
        offloads, zero = training.zero.offload_optimizer, self._engine.optimizer
        self._offloaded = OffloadedScalars(zero) if offloads else None
        skips_on_device = (
            self.stage < 3 and not offloads and training.settled_precision != "fp16" and device_can_decide()
        )
        self._skips = (
            DeviceSkips(self._adamw, zero if self.stage else None) if skips_on_device or not self.stage else None
        )
        self.lr_factor = 1.0
        self._frozen = self.module.model.frozen_names()
        if self._frozen:
            self._engine.module_state_dict = self._trained_state  # DeepSpeed would store frozen buffers
        parameters = dict(self.module.model.named_parameters())
        self._average = WeightAverage(parameters, training.ema_decay) if training.ema_decay else None

    def set_lr_factor(self, factor: float, backbone: float | None = None) -> None:
        """Set every group's learning rate to its base times `factor`; backbone groups use `backbone` if given."""
        self.lr_factor = factor
        for group, settings in zip(self._adamw.param_groups, self._settings, strict=True):
            in_backbone = settings["name"].startswith("backbone")
            group["lr"] = settings["lr"] * (factor if backbone is None or not in_backbone else backbone)

    def accumulate(self, batch: Batch, normalizers: Normalizers) -> Losses:
        """Run forward and backward of one micro-batch; return this rank's detached part of the step's losses."""
        losses = self._engine(batch, normalizers)
        # DeepSpeed averages over ranks, but the losses are parts of one sum, so their gradients must be added.
        self._engine.backward(losses.total * self.world_size, scale_wrt_gas=False)
        if not self._engine.is_gradient_accumulation_boundary():
            self._engine.step()
        return Losses(losses.total.detach(), losses.terms, losses.per_image)

    def finish_step(self, number: int) -> StepResult:
        """Clip, then apply update `number`, counted from 1, or skip it if a gradient is not finite."""
        return self.finish_update(number, float(self.update()))

    def update(self) -> Tensor | float:
        """Clip, then queue the update of the weights on the device, which skips it if a gradient is not finite.

        Returns the norm for `finish_update`: a tensor, [], on the device if no host synchronisation was needed, else a
        float.
        """
        if self.stage == 0:
            norm = self._clip_plain_gradients()
            self._engine.step()
            return norm
        if self._skips is not None:
            with self._skips.decided_on_device():
                self._engine.step()
            return self._engine.get_global_grad_norm()
        if self._offloaded is not None:
            self._offloaded.transfer_to_host()
        self._engine.step()
        return float(self._engine.get_global_grad_norm()) if self._engine.was_step_applied() else math.inf

    def finish_update(self, number: int, norm: float) -> StepResult:
        """Return the outcome of update `number`, given its norm. Call it before the next update."""
        applied = math.isfinite(norm)
        if applied and self._average is not None:
            self._average.update(number)
        if self.module.loss_scale is not None:
            self.module.loss_scale.update(applied)
        return StepResult(applied=applied, grad_norm=norm if applied else math.inf)

    def save(self, folder: Path, tag: str) -> None:
        """Write this rank's files to `folder/tag`, without frozen weights.

        A collective: every rank calls it with a folder of its own.
        """
        (folder / tag).mkdir(parents=True, exist_ok=True)
        scale = self.module.loss_scale
        client_state = {} if scale is None else {_LOSS_SCALE: scale.state()}
        self._engine.save_checkpoint(
            str(folder),
            tag=tag,
            client_state=client_state,
            save_latest=False,
            exclude_frozen_parameters=bool(self._frozen),
        )

    def load(self, folder: Path, tag: str, has_frozen: bool = False) -> None:
        """Restore what `save` wrote, without executing code. Raises CheckpointError for a file that requires code.

        With `has_frozen`, the model already has its frozen weights, which the files of earlier versions contain.
        """
        with safe_loads():
            load_module = self._load_trained_state if has_frozen else None
            _, client_state = self._engine.load_checkpoint(str(folder), tag=tag, custom_load_fn=load_module)
        if self.module.loss_scale is not None:
            self.module.loss_scale.load(client_state[_LOSS_SCALE])
        # Loading the universal format under ZeRO-3 gives all groups the settings of the first one, and one common step
        # counter, which would then count the updates of every group.
        for group, settings in zip(self._adamw.param_groups, self._settings, strict=True):
            group.update(settings)
        for state in self._adamw.state.values():
            state["step"] = state["step"].clone()

    def weights(self, frozen: bool = False) -> dict[str, Tensor]:
        """Return the weights and buffers of the model in fp32 on CPU on rank 0, and an empty dict on other ranks.

        These are all that are not frozen or, if `frozen` is set, the frozen ones. Every rank must call it.
        """
        model = self.module.model
        names = [name for name in model.state_dict() if (name in self._frozen) == frozen]
        if not names:
            return {}
        if self._has_master_weights:
            return _master_weights(model, names)
        if self.stage < 3:
            if dist.get_rank() != 0:
                return {}
            state = model.state_dict()
            return {name: state[name].cpu().contiguous() for name in names}
        return _gathered_weights(model, names)

    def averaged_weights(self, weights: dict[str, Tensor]) -> dict[str, Tensor] | None:
        """Return `weights`, the trained ones replaced by their moving averages; None if no average is kept.

        Every rank must call it.
        """
        return None if self._average is None else weights | self._average.gather()

    def load_average(self, weights: Mapping[str, Tensor] | None) -> None:
        """Restore the average from `weights`; if None, restart it from the model's current weights."""
        if self._average is None:
            return
        if weights is None:
            self._average = WeightAverage(dict(self.module.model.named_parameters()), self._average.decay)
        else:
            self._average.load(weights)

    def _trained_state(self, **_: Any) -> dict[str, Tensor]:
        """Return the state dict of the module without frozen weights and buffers, for DeepSpeed's files."""
        frozen = {f"model.{name}" for name in self._frozen}
        return {name: value for name, value in self.module.state_dict().items() if name not in frozen}

    def _load_trained_state(self, src: dict[str, Tensor], dst: torch.nn.Module) -> None:
        """Load a state dict from DeepSpeed's files, which must have every weight except the frozen ones."""
        state = dst.state_dict()
        dst.load_state_dict({name: state[name] for name in (f"model.{name}" for name in self._frozen)} | src)

    def _clip_plain_gradients(self) -> Tensor:
        """Clip the gradients without ZeRO, because DeepSpeed would then apply updates with non-finite gradients."""
        assert self._skips is not None
        parameters = [p for p in self.module.parameters() if p.grad is not None]
        norm = torch.nn.utils.clip_grad_norm_(parameters, self._clip_norm or math.inf)
        self._skips.skip_unless_finite(norm)
        return norm


def check_world_size(training: TrainingConfig, world_size: int) -> None:
    """Raise TrainingError if the global batch has fewer images than there are ranks."""
    if training.global_batch < world_size:
        raise TrainingError(
            f"training.global_batch is {training.global_batch}, but there are {world_size} ranks; "
            "use at least one image per rank or fewer ranks"
        )


def check_device(training: TrainingConfig, device: torch.device) -> None:
    """Raise TrainingError if the device does not support the precision."""
    if training.precision == "fp16" and device.type == "cpu":
        raise TrainingError(
            "training.precision is fp16, which needs a GPU; set it to bf16_autocast, fp16_autocast, bf16 or fp32"
        )


def deepspeed_config(training: TrainingConfig, world_size: int, universal: bool = False) -> dict[str, Any]:
    """Translate our settings to DeepSpeed's. Optimizer, schedule and autocast are missing, because we use our own."""
    plan = step_positions(0, training.global_batch, 0, world_size, training.micro_batch)
    zero = training.zero
    # A single rank exchanges nothing, so it needs neither gradient hooks nor a second copy of the gradients.
    is_single_rank = world_size == 1 and zero.stage == 1
    stage3 = {"stage3_param_persistence_threshold": zero.param_persistence_threshold} if zero.stage == 3 else {}
    offload = {"offload_optimizer": {"device": "cpu", "pin_memory": True}} if zero.offload_optimizer else {}
    sixteen_bit = (
        {training.settled_precision: {"enabled": True}} if training.settled_precision in ("bf16", "fp16") else {}
    )
    return {
        "train_micro_batch_size_per_gpu": len(plan[0]),
        "gradient_accumulation_steps": len(plan),
        "gradient_clipping": training.optimizer.clip_norm if zero.stage else 0.0,  # stage 0: _clip_plain_gradients
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,  # DeepSpeed's is compiled at the first start; torch has a fused one
        "steps_per_print": None,
        "timers": {"throughput": {"enabled": False}},  # it would synchronise with the device twice per micro-batch
        "checkpoint": {"load_universal": universal},
        "zero_optimization": {
            "stage": zero.stage,
            "reduce_bucket_size": zero.reduce_bucket_size,
            "overlap_comm": zero.overlap_comm and zero.stage > 0 and not is_single_rank,
            "contiguous_gradients": not is_single_rank,
            **stage3,
            **offload,
        },
        **sixteen_bit,
    }


def to_universal(source: Path, target: Path) -> None:
    """Convert the files that all ranks wrote in `Engine.save`, for use with another number of ranks.

    Executes no code from the files: raises CheckpointError for a file that requires code.
    """
    _import_deepspeed()
    from deepspeed.checkpoint import ds_to_universal

    arguments = Namespace(
        input_folder=str(source),
        output_folder=str(target),
        num_extract_workers=1,
        num_merge_workers=1,
        keep_temp_folder=False,
        strict=True,
        inject_missing_state=True,
    )
    with safe_loads(), redirect_stdout(StringIO()), redirect_stderr(StringIO()):  # progress bars
        ds_to_universal.main(arguments)


def _build_adamw(module: TrainingModule, training: TrainingConfig) -> torch.optim.AdamW:
    """Build a fused AdamW: one pass over memory. On CPUs the other variants take a third of a second for an R50."""
    config = training.optimizer
    groups = build_param_groups(module, config)
    return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, eps=config.eps, fused=True)


def _initialize(module: TrainingModule, optimizer: torch.optim.AdamW, config: dict[str, Any]) -> Any:
    deepspeed = _import_deepspeed()
    deepspeed.init_distributed(dist_backend=dist.get_backend(), verbose=False)  # adopts the existing group
    engine, *_ = deepspeed.initialize(model=module, optimizer=optimizer, config=config)
    return engine


def _import_deepspeed() -> Any:
    """Import DeepSpeed for the available device, quietly and without compiling its shared-memory all-reduce."""
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
    import deepspeed
    from deepspeed.ops import __compatible_ops__
    from deepspeed.utils import logger

    logger.setLevel(logging.WARNING)
    __compatible_ops__["deepspeed_shm_comm"] = False  # used by inference only; compiling it takes minutes
    return deepspeed


def _gathered_weights(model: torch.nn.Module, names: Sequence[str]) -> dict[str, Tensor]:
    """Return these weights of a ZeRO-3 model on rank 0, gathered in portions of bounded size; empty on other ranks."""
    gathered = _import_deepspeed().zero.GatheredParameters
    parameters, state = dict(model.named_parameters()), model.state_dict()
    named: dict[str, Any] = {name: parameters[name] for name in names if name in parameters}  # with a ds_numel
    weights = {name: state[name].cpu() for name in names if name not in parameters}
    for portion in _portions(list(named), [p.ds_numel for p in named.values()]):
        with gathered([named[name] for name in portion]):
            if dist.get_rank() == 0:
                weights |= {name: named[name].detach().cpu().clone() for name in portion}
    return weights if dist.get_rank() == 0 else {}


def _master_weights(model: torch.nn.Module, names: Sequence[str]) -> dict[str, Tensor]:
    """Return these weights on rank 0, with the optimizer's fp32 copies of 16-bit trained weights.

    Every rank must call it.
    """
    _import_deepspeed()
    from deepspeed.utils import safe_get_full_fp32_param

    first = dist.get_rank() == 0
    parameters, buffers = dict(model.named_parameters()), dict(model.named_buffers())
    weights = {name: buffers[name].cpu() for name in names if first and name in buffers}
    for name in names:
        if name not in parameters:
            continue
        parameter = parameters[name]
        master = safe_get_full_fp32_param(parameter) if parameter.requires_grad else parameter.detach().float()
        assert master is not None, "ZeRO 1 to 3 keep a copy of every trainable parameter"
        if first:
            weights[name] = master.cpu().clone()
    return weights


def _portions(names: list[str], sizes: list[int]) -> list[list[str]]:
    portions: list[list[str]] = [[]]
    filled = 0
    for name, size in zip(names, sizes, strict=True):
        if portions[-1] and filled + size > _MAX_GATHERED_ELEMENTS:
            portions.append([])
            filled = 0
        portions[-1].append(name)
        filled += size
    return portions
