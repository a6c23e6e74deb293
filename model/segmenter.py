"""Interface of all models to training, evaluation and export."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor, nn

from m2f.model.config import FreezablePart, ModelConfig
from m2f.model.pilots import Pilots
from m2f.model.structures import Predictions, Targets


@dataclass(frozen=True)
class TrainingContext:
    """Inputs of a training forward pass besides the images."""

    targets: Targets
    """Targets of the same images."""
    seed: int
    """Seed of the run. The model derives its counter-based random numbers from it and `targets.position`."""
    pilots: Pilots | None = None
    """Additional queries, which come first in the predictions. None if the recipe uses no pilots."""


class Segmenter(nn.Module):
    """Base class of all models.

    A model has the parts `backbone`, `pixel_decoder` and `transformer_decoder`, which recipes can freeze.
    """

    regions: tuple[str, ...] = ("backbone", "pixel_decoder", "transformer_decoder")
    """Names of the submodules that can be compiled, each into one graph."""
    scheduled_buffers: tuple[str, ...] = ()
    """Names of the buffers that `set_progress` changes, also in frozen parts."""
    pixel_decoder_fp32: bool
    """Whether the pixel decoder has fp32 weights and runs without autocast."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.pixel_decoder_fp32 = False
        self._frozen: tuple[FreezablePart, ...] = ()
        # Plain numbers instead of buffers, so that casting the model to bfloat16 does not round them.
        self.pixel_mean, self.pixel_std = config.pixel_mean, config.pixel_std

    def forward(self, images: Tensor, context: TrainingContext | None = None) -> Predictions:
        """Return predictions for `images` [B, 3, H, W], as `normalise` returns them.

        `context` is given in training only.
        """
        raise NotImplementedError

    def set_progress(self, step: int, max_steps: int) -> None:
        """Prepare a training step, given the numbers of finished and of all steps. The base class does nothing."""

    def freeze(self, parts: Sequence[FreezablePart]) -> None:
        """Exclude these parts from training.

        Their weights get no gradients. Their norms and dropouts stay in evaluation mode.
        """
        self._frozen = tuple(parts)
        for part in parts:
            self.get_submodule(part).requires_grad_(False)
        self.train(self.training)

    def frozen_names(self) -> frozenset[str]:
        """Return the names of the weights and buffers that training never changes; empty if no part is frozen."""
        if not self._frozen:
            return frozenset()
        parts = tuple(f"{part}." for part in self._frozen)
        weights = dict(self.named_parameters(remove_duplicate=False))
        return frozenset(
            name
            for name in self.state_dict()
            if (not weights[name].requires_grad if name in weights else name.startswith(parts))
            and name not in self.scheduled_buffers
        )

    def train(self, mode: bool = True) -> Self:
        """Set the training mode as in torch, except that frozen parts stay in evaluation mode."""
        super().train(mode)
        for part in self._frozen:
            self.get_submodule(part).eval()
        return self

    @torch.no_grad()
    def normalise(self, images: Tensor, sizes: Tensor | None = None) -> Tensor:
        """Normalise RGB `images` [B, 3, H, W] in 0..255 to zero mean and unit variance.

        The result is float32, on the same device. Pixels outside each image's (height, width) in `sizes` [B, 2] become
        0, as if padding came after normalisation. On an accelerator the result is channels-last, so all maps of a
        convolutional backbone are too. On a CPU it is contiguous: repacking the kernels for every image would cost more
        than channels-last saves.
        """
        # Filled on the device, because a copy from the host would wait for all queued work.
        mean, std = (
            torch.stack([torch.full((1, 1), value, dtype=torch.float32, device=images.device) for value in values])
            for values in (self.pixel_mean, self.pixel_std)
        )
        normalised = (images.to(torch.float32) - mean) / std
        if sizes is not None:
            normalised = zero_outside(normalised, sizes.to(images.device))
        is_cpu = images.device.type == "cpu"
        return normalised.contiguous(memory_format=torch.contiguous_format if is_cpu else torch.channels_last)


def zero_outside(images: Tensor, sizes: Tensor) -> Tensor:
    """Return `images` [B, C, H, W] with zeros below and to the right of each (height, width) in `sizes` [B, 2]."""
    height, width = images.shape[-2:]
    rows = torch.arange(height, device=images.device) < sizes[:, :1]
    columns = torch.arange(width, device=images.device) < sizes[:, 1:]
    inside = rows[:, None, :, None] & columns[:, None, None, :]
    return torch.where(inside, images, 0.0)  # unlike masked_fill, keeps the memory format
