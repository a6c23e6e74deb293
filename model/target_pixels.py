"""Mapping from pixels of an id map to targets."""

from __future__ import annotations

import torch
from torch import Tensor

from m2f.model.structures import Targets, ignore_id


def pixel_owners(targets: Targets, numbers: Tensor, no_owner: int) -> Tensor:
    """Return the number of the target that owns each pixel, [B, Y, H, W] in the dtype of `numbers`.

    `numbers` [B, N] are the numbers of the targets. Pixels without a target get `no_owner`: background, void, and ids
    of targets that are not valid.
    """
    maps = targets.id_maps
    void = ignore_id(maps.dtype)
    image = torch.arange(len(maps), device=maps.device)[:, None]
    number_of_id = torch.full((*maps.shape[:2], void + 1), no_owner, dtype=numbers.dtype, device=maps.device)
    local_id = torch.where(targets.valid, targets.local_id, void)
    number_of_id = number_of_id.index_put((image, targets.layer, local_id), numbers)
    number_of_id[..., void] = no_owner
    return number_of_id.gather(2, maps.long().flatten(2)).view(maps.shape)
