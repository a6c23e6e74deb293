"""Split of a source into a training and a validation part."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence

from m2f.data_pipeline.errors import DataError
from m2f.data_pipeline.source_parts import PartConfig
from m2f.model.format_count import format_count


def part_indices(keys: Sequence[str], part: PartConfig) -> tuple[int, ...]:
    """Return the positions of the keys of a part, in order.

    Groups are ranked by a hash. The two parts share no group and together contain all keys.

    Raises:
        DataError: the regular expression is invalid, or there are fewer than two groups.
    """
    groups = [group_of(key, part.group) for key in keys]
    ranked = sorted(set(groups), key=lambda group: hashlib.sha256(group.encode()).digest())
    if len(ranked) < 2:
        raise DataError(
            f"a part needs at least 2 groups of images, but {format_count(len(keys), 'image')} form {len(ranked)}; add "
            "images, or correct datasets.<name>.part.group (`m2f init --group`)"
        )
    count = min(max(1, round(part.val_share * len(ranked))), len(ranked) - 1)
    chosen = set(ranked[:count])
    return tuple(i for i, group in enumerate(groups) if (group in chosen) == (part.take == "val"))


def group_of(key: str, expression: str | None) -> str:
    """Return the group of a sample by its key; see `PartConfig.group`. A key without a match is a group of its own.

    Raises DataError if the regular expression is invalid.
    """
    if expression is None:
        return key
    try:
        match = re.match(expression, key)
    except re.error as error:
        raise DataError(
            f"datasets.<name>.part.group is {expression!r}, which is not a regular expression: {error}"
        ) from error
    if match is None:
        return key
    return (match[1] if match.re.groups else match[0]) or key
