"""Make text safe for terminals, logs and pages: names from files may contain terminal control characters."""

from __future__ import annotations

import re

# Control characters except tab and line feed, surrogates, and Unicode characters that reorder or end a line.
_COMMANDS = r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]"
_UNPRINTABLE = re.compile(_COMMANDS)
_UNPRINTABLE_BUT_COLORS = re.compile(rf"(\x1b\[[0-9;]{{0,20}}m)|{_COMMANDS}")


def printable(text: str, colors: bool = False) -> str:
    """Return the text with unprintable characters as Python escapes. `colors` keeps sequences that set a colour."""
    if colors:
        return _UNPRINTABLE_BUT_COLORS.sub(lambda match: match[1] or ascii(match[0])[1:-1], text)
    return _UNPRINTABLE.sub(lambda match: ascii(match[0])[1:-1], text)
