"""Build hook that refuses a checkout without symbolic links, whose package would hold text files instead of folders."""

from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

FOLDERS = ("model", "data_pipeline", "trainer", "eval", "cluster", "configs")


class WholePackage(BuildHookInterface):
    """Checks the folders of the package before every build, except an editable installation, which needs no links."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Raise RuntimeError if a folder is missing."""
        missing = [name for name in FOLDERS if not Path(self.root, "m2f", name).is_dir()]
        if missing and version != "editable":
            raise RuntimeError(
                f"m2f/{', m2f/'.join(missing)}: not a folder, because this checkout has no symbolic links. Run "
                "`git config core.symlinks true` and `git checkout -- m2f`, then build again"
            )
