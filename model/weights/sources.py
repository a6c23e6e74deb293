"""Sources of weights other than paths and URLs (standard library only)."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Self

from m2f.model.errors import ConfigError

HUB = "hub:"
"""Prefix of a model address on the Hugging Face hub: `hub:OWNER/NAME` or `hub:OWNER/NAME@REVISION`."""
PACKAGE = "package:"
"""Prefix of weights in an installed Python package: `package:NAME`."""

_HUB = re.compile(r"hub:([\w.-]+/[\w.-]+)(?:@([\w./-]+))?")
_SUFFIXES = ("safetensors", "pt", "pth", "pkl", "bin")
_COMMIT = re.compile(r"[0-9a-f]{40}")


def is_file(weights: str) -> bool:
    """Return whether a path or URL names a file of weights, by its suffix, rather than a folder."""
    return weights.rsplit("/", 1)[-1].rpartition(".")[2] in _SUFFIXES


def is_path(weights: str) -> bool:
    """Return whether a weights setting names a file or folder on this machine."""
    return "://" not in weights and not weights.startswith((HUB, PACKAGE))


@dataclass(frozen=True)
class HubAddress:
    """Address of a model on the Hugging Face hub."""

    repo: str
    """Repository in the form OWNER/NAME."""
    revision: str = "main"
    """Branch, tag or full commit hash."""

    @classmethod
    def parse(cls, text: str, setting: str = "model.weights") -> Self:
        """Parse `hub:OWNER/NAME[@REVISION]`. Raises ConfigError, which names `setting`, for any other form."""
        match = _HUB.fullmatch(text)
        if match is None:
            raise ConfigError(f"{setting} is {text!r}; write hub:OWNER/NAME or hub:OWNER/NAME@REVISION")
        return cls(match[1], match[2] or "main")

    @property
    def is_commit(self) -> bool:
        """Return whether the revision is a commit, which always refers to the same files."""
        return _COMMIT.fullmatch(self.revision) is not None

    def __str__(self) -> str:
        return f"{HUB}{self.repo}@{self.revision}"
