"""What a setting of weights may be besides a path or a URL (standard library only)."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Self

from m2f.model.errors import ConfigError

HUB = "hub:"
"""Begins the address of a model on the Hugging Face hub: `hub:OWNER/NAME` or `hub:OWNER/NAME@REVISION`."""
PACKAGE = "package:"
"""Begins the name of weights that an installed Python package holds: `package:NAME`."""

_HUB = re.compile(r"hub:([\w.-]+/[\w.-]+)(?:@([\w./-]+))?")
_COMMIT = re.compile(r"[0-9a-f]{40}")


def is_path(weights: str) -> bool:
    """Whether a setting of weights names a file or folder of this machine."""
    return "://" not in weights and not weights.startswith((HUB, PACKAGE))


@dataclass(frozen=True)
class HubAddress:
    """A model on the Hugging Face hub."""

    repo: str
    """OWNER/NAME."""
    revision: str = "main"
    """Branch, tag or commit."""

    @classmethod
    def parse(cls, text: str, setting: str = "model.weights") -> Self:
        """Raises ConfigError for another form than `hub:OWNER/NAME[@REVISION]`."""
        match = _HUB.fullmatch(text)
        if match is None:
            raise ConfigError(f"{setting} is {text!r}; write hub:OWNER/NAME or hub:OWNER/NAME@REVISION")
        return cls(match[1], match[2] or "main")

    @property
    def is_commit(self) -> bool:
        """Whether the revision is a commit, which always means the same files."""
        return _COMMIT.fullmatch(self.revision) is not None

    def __str__(self) -> str:
        return f"{HUB}{self.repo}@{self.revision}"
