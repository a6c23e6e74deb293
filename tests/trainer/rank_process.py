"""Entry point of a rank's process. It imports the scenarios there, so pytest's process does not. Not a test module."""

from __future__ import annotations

import os
from pathlib import Path


def run_rank(variables: dict[str, str], scenarios: str, folder: Path, log: Path) -> None:
    """Run the scenarios, which are separated by commas, with output redirected to `log`."""
    os.environ.update(variables)
    with log.open("w") as out:
        os.dup2(out.fileno(), 1)
        os.dup2(out.fileno(), 2)
    from tests.trainer.rank_main import main

    main(scenarios.split(","), folder)
