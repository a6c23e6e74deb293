"""Refuses to build a package from a checkout without symbolic links: it would hold text files in place of folders."""

from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

FOLDERS = ("model", "data_pipeline", "trainer", "eval", "cluster", "configs")


class WholePackage(BuildHookInterface):
    """Looks before every build but that of an editable installation, which needs no links."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Raises RuntimeError where one of the folders is not there."""
        missing = [name for name in FOLDERS if not Path(self.root, "m2f", name).is_dir()]
        if missing and version != "editable":
            raise RuntimeError(
                f"m2f/{', m2f/'.join(missing)}: no folder. This checkout has no symbolic links: git config "
                "core.symlinks true, git checkout -- m2f, and build again"
            )
