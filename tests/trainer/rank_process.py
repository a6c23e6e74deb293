"""Entry point of a rank's process. Scenarios are imported only there, not in pytest's process. Not a test module."""

from __future__ import annotations

import os
from pathlib import Path


def run_rank(variables: dict[str, str], scenarios: str, folder: Path, log: Path) -> None:
    """Run the comma-separated scenarios with output redirected to `log`."""
    os.environ.update(variables)
    with log.open("w") as out:
        os.dup2(out.fileno(), 1)
        os.dup2(out.fileno(), 2)
    from tests.trainer.rank_main import main

    main(scenarios.split(","), folder)
