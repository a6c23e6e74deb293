"""Numbers with their nouns for messages."""

from __future__ import annotations


def format_count(number: int, noun: str, plural: str | None = None) -> str:
    """Return a number with its noun, such as `1 shard` or `1,200 shards`.

    Pass `plural` if it is not the noun plus "s".
    """
    return f"{number:,} {noun if number == 1 else plural or noun + 's'}"
