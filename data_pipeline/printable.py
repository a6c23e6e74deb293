"""Make text safe for terminals, logs and pages: names from files may contain terminal control characters.

Lines are printed here, too, because a full disk behind a log must not end a long job.
"""

from __future__ import annotations

import re
import sys
import unicodedata
from contextlib import suppress
from typing import TextIO

# Control characters except tab and line feed, surrogates, and Unicode characters that reorder or end a line.
_COMMANDS = r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]"
_UNPRINTABLE = re.compile(_COMMANDS)
_UNPRINTABLE_BUT_COLORS = re.compile(rf"(\x1b\[[0-9;]{{0,20}}m)|{_COMMANDS}")
_INCOMPLETE: set[str] = set()
"""Names of the standard streams that have lost a line of this process."""


def printable(text: str, colors: bool = False) -> str:
    """Return the text with unprintable characters as Python escapes. `colors` keeps sequences that set a colour."""
    if colors:
        return _UNPRINTABLE_BUT_COLORS.sub(lambda match: match[1] or ascii(match[0])[1:-1], text)
    return _UNPRINTABLE.sub(lambda match: ascii(match[0])[1:-1], text)


def to_ascii(text: str) -> str:
    """Return a text without accents and with ? for other non-ASCII letters, which the fonts of pictures lack."""
    letters = (c for c in unicodedata.normalize("NFKD", text) if not unicodedata.combining(c))
    return "".join(letters).encode("ascii", "replace").decode()


def print_line(stream: TextIO, text: str, colors: bool = False) -> None:
    """Print a line with unprintable characters as Python escapes, and flush the stream.

    If the disk or terminal behind the stream refuses the line, it is lost, and the other standard stream says so once.
    Raises BrokenPipeError if the reader of a pipe has ended.
    """
    try:
        stream.write(printable(text, colors) + "\n")
        stream.flush()
    except BrokenPipeError:
        raise
    except OSError as error:
        name, other = ("stderr", sys.stdout) if stream is sys.stderr else ("stdout", sys.stderr)
        if name not in _INCOMPLETE:
            _INCOMPLETE.add(name)
            with suppress(OSError):
                other.write(f"lines are missing in {name}, because its disk or terminal refuses them ({error})\n")
                other.flush()


def has_lost_output() -> bool:
    """Return whether a line that this process printed to standard output is lost."""
    return "stdout" in _INCOMPLETE
