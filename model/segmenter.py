"""What every model of this package is to training, evaluation and export, whatever its parts do."""

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
    """What a forward pass of training may use besides the images."""

    targets: Targets
    """Of the same images; their `position` keys every random number."""
    seed: int
    """Of the run."""
    pilots: Pilots | None = None
    """Further queries. Predictions have theirs first; only models whose decoder takes pilots are given any."""


class Segmenter(nn.Module):
    """A model with the parts `backbone`, `pixel_decoder` and `transformer_decoder`, which recipes can freeze."""

    regions: tuple[str, ...] = ("backbone", "pixel_decoder", "transformer_decoder")
    """Submodules that can be compiled, each into one graph."""
    pixel_decoder_fp32: bool
    """Whether autocast stops at the pixel decoder, whose weights are then in fp32."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.pixel_decoder_fp32 = False
        self._frozen: tuple[FreezablePart, ...] = ()
        # Numbers and not buffers: a model cast to bfloat16 must not round them.
        self.pixel_mean, self.pixel_std = config.pixel_mean, config.pixel_std

    def forward(self, images: Tensor, context: TrainingContext | None = None) -> Predictions:
        """`images` [B, 3, H, W] as `normalise` returns them; `context` in training alone."""
        raise NotImplementedError

    def set_progress(self, step: int, max_steps: int) -> None:
        """Told before every step of a training how many are done, and how many there will be."""

    def freeze(self, parts: Sequence[FreezablePart]) -> None:
        """Let no training change these parts: weights take no gradients, norms and dropouts stay in evaluation mode."""
        self._frozen = tuple(parts)
        for part in parts:
            self.get_submodule(part).requires_grad_(False)
        self.train(self.training)

    def train(self, mode: bool = True) -> Self:
        """As in torch, but for frozen parts, which stay in evaluation mode."""
        super().train(mode)
        for part in self._frozen:
            self.get_submodule(part).eval()
        return self

    @torch.no_grad()
    def normalise(self, images: Tensor, sizes: Tensor | None = None) -> Tensor:
        """RGB `images` [B, 3, H, W] in 0..255 to float32 of zero mean and unit variance, on the device of the images.

        Pixels outside each image's (height, width) in `sizes` [B, 2] become 0, as if they were padded afterwards.
        The result is channels-last in memory, and so are then all maps of a convolutional backbone; on a CPU it is
        contiguous, because repacking the kernels for every image would cost more than the format gains.
        """
        # Filled on the device: a copy from the host would wait for all work queued before it.
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
    """`images` [B, C, H, W] with zeros below and to the right of each (height, width) in `sizes` [B, 2]."""
    height, width = images.shape[-2:]
    rows = torch.arange(height, device=images.device) < sizes[:, :1]
    columns = torch.arange(width, device=images.device) < sizes[:, 1:]
    inside = rows[:, None, :, None] & columns[:, None, None, :]
    return torch.where(inside, images, 0.0)  # keeps the memory format, which masked_fill does not
