"""Pilots: training queries with a known target (mask-piloted training, Zhang et al., MP-Former, CVPR 2023).

A pilot starts from the class of its target, and its attention mask is the true mask in every layer. Noise can be added
to both. Pilots precede the other queries, which cannot attend to them. Inference uses no pilots.

Axis letters: B images, N pilots, C channels, Q other queries, Y id-map layers, H x W input pixels, T cells of the
levels that a layer attends to.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import IntEnum
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from m2f.model.config import MaskedTransformerDecoderConfig, ModelConfig
from m2f.model.random_bits import GOLDEN, mix, shift_right, signed, to_unit_interval
from m2f.model.structures import Targets
from m2f.model.target_pixels import pixel_owners

BUCKET = 8
"""Minimum number of pilots per image, padding included."""
_SALT = 0x50494C4F54
"""Separates the random numbers of pilots from those of the loss points."""


class _Word(IntEnum):
    """Uses of a target's random bits. Attention-mask cells use CELLS and all words after it."""

    CHOICE = 1
    LABEL_NOISE = 2
    LABEL = 3
    CELLS = 4


class Pilots(NamedTuple):
    """The pilots of a micro-batch, padded to the same number per image."""

    content: Tensor
    """[B, N, C] initial queries; zeros if not valid."""
    target: Tensor
    """[B, N] int64 index of the target."""
    valid: Tensor
    """[B, N] bool; valid pilots come first in every row."""
    owners: Tensor
    """[B, Y, H, W] int16 index of the pilot of every pixel; N if there is none."""
    keys: Tensor
    """[B, N] int64, 64 random bits for every target."""
    mask_noise: float
    """Expected number of flipped attention-mask cells, as a share of the target's cells."""
    first_prediction: int
    """Index of the first prediction with a loss. Before the decoder, all pilots of one class are equal and cannot be
    supervised."""

    def at(self, sizes: Sequence[Sequence[int]]) -> PilotGuides:
        """Return the decoder's inputs for levels with these sizes (height, width)."""
        cells = tuple(covered_cells(self.owners, self.target.shape[1], (height, width)) for height, width in sizes)
        return PilotGuides(self.content, self.valid, cells, self.keys, self.mask_noise)


class PilotGuides(NamedTuple):
    """Decoder inputs of the pilots."""

    content: Tensor
    """[B, N, C] initial queries."""
    valid: Tensor
    """[B, N] bool."""
    cells: tuple[Tensor, ...]
    """[B, N, h * w] bool for every level: cells that the target covers at least partly."""
    keys: Tensor
    """[B, N] int64, 64 random bits for every target."""
    mask_noise: float
    """Expected number of flipped attention-mask cells, as a share of the target's cells."""

    @torch.no_grad()
    def attention_mask(self, layer: int, levels: Sequence[int]) -> Tensor:
        """Return the cells [B, 1, N, T] of these levels that each pilot may attend to in a decoder layer.

        A pilot without any cell may attend to all cells.
        """
        cells = [self.cells[level] for level in levels]
        if self.mask_noise:
            words = [_Word.CELLS + layer * len(self.cells) + level for level in levels]
            cells = [
                flip_cells(level, mix(self.keys + signed(word * GOLDEN)), self.mask_noise)
                for level, word in zip(cells, words, strict=True)
            ]
        allowed = torch.cat(cells, dim=-1)
        return (allowed | ~allowed.any(dim=-1, keepdim=True))[:, None]

    def self_attention_mask(self, num_queries: int) -> Tensor:
        """Return which queries (columns) a query (row) may attend to, bool [B, 1, N + Q, N + Q].

        All rows may attend to the Q queries that are not pilots. Pilots may also attend to valid pilots, and padding to
        itself. Nothing else attends to padding, so the result for an image does not depend on the amount of padding.
        """
        images, num_pilots = self.valid.shape
        is_pilot = torch.arange(num_pilots + num_queries, device=self.valid.device) < num_pilots
        visible_to_pilots = torch.cat((self.valid, self.valid.new_ones(images, num_queries)), dim=1)[:, None]
        allowed = torch.where(is_pilot[:, None], visible_to_pilots, ~is_pilot)
        identity = torch.eye(num_pilots + num_queries, dtype=torch.bool, device=self.valid.device)
        return (allowed | identity)[:, None]


class PilotQueries(nn.Module):
    """Makes the pilots of a micro-batch from its targets. Its class embedding is trained but not part of the model."""

    def __init__(self, config: ModelConfig, seed: int) -> None:
        super().__init__()
        decoder = config.transformer_decoder
        assert config.num_classes is not None
        assert isinstance(decoder, MaskedTransformerDecoderConfig)  # ModelConfig rejects pilots for other decoders
        self.settings, self.seed = config.pilots, seed
        self.class_query = nn.Embedding(config.num_classes, decoder.hidden_dim)
        self.first_prediction = 1 if decoder.queries == "supervised" else 0

    def forward(self, targets: Targets) -> Pilots:
        """Return the pilots of these targets.

        Every random number is a function of the seed, the image's position and the target.
        """
        images, num_targets = targets.valid.shape
        device = targets.valid.device
        chosen = min(num_targets, self.settings.max_targets)
        num_pilots = padded_number(chosen, self.settings.max_targets)
        image_keys = mix(targets.position + signed((self.seed ^ _SALT) * GOLDEN))
        keys = mix(image_keys[:, None] + torch.arange(1, num_targets + 1, device=device) * GOLDEN)
        target = choose(targets.valid, keys, chosen)
        keys, labels, valid = (values.gather(1, target) for values in (keys, targets.labels, targets.valid))
        target, keys, labels, valid = (
            F.pad(values, (0, num_pilots - chosen)) for values in (target, keys, labels, valid)
        )

        place = torch.where(valid, target, num_targets)
        pilot_of_target = torch.full((images, num_targets + 1), num_pilots, dtype=torch.int16, device=device)
        pilot_of_target.scatter_(
            1, place, torch.arange(num_pilots, dtype=torch.int16, device=device).expand(images, -1)
        )
        content = self.class_query(self._with_label_noise(labels, keys))
        return Pilots(
            content=torch.where(valid[..., None], content, 0.0),
            target=target,
            valid=valid,
            owners=pixel_owners(targets, pilot_of_target[:, :num_targets], num_pilots),
            keys=keys,
            mask_noise=self.settings.mask_noise,
            first_prediction=self.first_prediction,
        )

    def _with_label_noise(self, labels: Tensor, keys: Tensor) -> Tensor:
        """Return labels [B, N] with some replaced by a random class, which may be the same class."""
        replaced = to_unit_interval(mix(keys + signed(_Word.LABEL_NOISE * GOLDEN))) < self.settings.label_noise
        drawn = shift_right(mix(keys + signed(_Word.LABEL * GOLDEN)), 1) % self.class_query.num_embeddings
        return torch.where(replaced, drawn, labels)


def padded_number(chosen: int, max_targets: int) -> int:
    """Return the padded number of pilots per image: the next power of two, at least BUCKET.

    The result is at most `max_targets` rounded up to a multiple of BUCKET. Few distinct values keep the number of
    tensor shapes small.
    """
    power = 1 << max(chosen - 1, BUCKET - 1).bit_length()
    return min(power, -(-max_targets // BUCKET) * BUCKET)


def choose(valid: Tensor, keys: Tensor, count: int) -> Tensor:
    """Return indices [B, count], ascending, of the targets whose keys have the lowest hash.

    `valid` bool and `keys` int64 have the shape [B, number of targets]. Targets that are not valid are selected last.
    """
    if count == valid.shape[1]:
        return torch.arange(count, device=valid.device).expand(len(valid), -1)
    order = shift_right(mix(keys + signed(_Word.CHOICE * GOLDEN)), 1)
    order = torch.where(valid, order, torch.iinfo(torch.int64).max)
    return order.argsort(dim=1)[:, :count].sort(dim=1).values


def covered_cells(owners: Tensor, number: int, size: tuple[int, int]) -> Tensor:
    """Return bool cells [B, number, h * w] of a level of `size`, True if any pixel of the cell has this owner.

    `owners` is [B, Y, H, W]. Even an object of one pixel has a cell at every stride. One scatter serves all owners, so
    no dense full-size masks are needed.
    """
    height, width = owners.shape[-2:]
    rows, columns = (
        torch.arange(pixels, device=owners.device) * cells // pixels
        for pixels, cells in zip((height, width), size, strict=True)
    )
    num_cells = size[0] * size[1]
    index = (owners.long() * num_cells).add_(rows[:, None] * size[1] + columns).flatten(1)
    covered = torch.zeros(len(owners), (number + 1) * num_cells, dtype=torch.bool, device=owners.device)
    return covered.scatter_(1, index, True).view(len(owners), number + 1, num_cells)[:, :number]


def flip_cells(cells: Tensor, keys: Tensor, noise: float) -> Tensor:
    """Flip each cell of `cells` [B, N, T] with probability `noise` times the share of cells that are set.

    `keys` [B, N] holds 64 random bits for each row.
    """
    counters = torch.arange(1, cells.shape[-1] + 1, device=cells.device) * GOLDEN
    share = cells.float().mean(-1, keepdim=True)
    return cells ^ (to_unit_interval(mix(keys[..., None] + counters)) < noise * share)
