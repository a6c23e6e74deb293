"""An optimizer step in plain PyTorch, with the optimizer, schedule and moving average of a recipe."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from m2f.trainer.config import TrainingConfig
from m2f.trainer.engine.param_groups import build_param_groups
from m2f.trainer.engine.schedule import lr_factor


class PlainStep:
    """Backward pass, clipping, AdamW, and a moving average of the weights if the recipe keeps one."""

    def __init__(self, model: nn.Module, training: TrainingConfig) -> None:
        groups = build_param_groups(model, training.optimizer)
        self._model, self._training = model, training
        self._rates = [group["lr"] for group in groups]
        self._adamw = torch.optim.AdamW(groups, betas=training.optimizer.betas, eps=training.optimizer.eps)
        self._average = {name: tensor.detach().clone() for name, tensor in self._averaged_parameters()}

    def __call__(self, loss: Tensor, step: int) -> None:
        """Run the backward pass of `loss` and update the weights; `step` is the number of finished steps."""
        loss.backward()
        nn.utils.clip_grad_norm_(self._model.parameters(), self._training.optimizer.clip_norm or math.inf)
        factor = lr_factor(self._training.schedule, step, self._training.max_steps)
        for group, rate in zip(self._adamw.param_groups, self._rates, strict=True):
            group["lr"] = rate * factor
        self._adamw.step()
        self._adamw.zero_grad()
        self._update_average(step + 1)

    def weights(self) -> dict[str, Tensor]:
        """Return the state dict, with moving averages for trained parameters if the recipe keeps them."""
        return self._model.state_dict() | self._average

    def state(self) -> dict[str, Any]:
        """Return the state for a checkpoint, without the weights of the model."""
        return {"adamw": self._adamw.state_dict(), "average": self._average}

    def load(self, state: dict[str, Any]) -> None:
        """Restore a state that the method `state` returned."""
        self._adamw.load_state_dict(state["adamw"])
        self._average = state["average"]

    def _averaged_parameters(self) -> list[tuple[str, nn.Parameter]]:
        if not self._training.ema_decay:
            return []
        return [(name, parameter) for name, parameter in self._model.named_parameters() if parameter.requires_grad]

    @torch.no_grad()
    def _update_average(self, number: int) -> None:
        """Update the average with the decay that our trainer uses after step `number`."""
        decay = min(self._training.ema_decay, (1 + number) / (10 + number))
        for name, parameter in self._averaged_parameters():
            self._average[name].lerp_(parameter, 1 - decay)
