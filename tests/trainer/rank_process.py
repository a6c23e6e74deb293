"""The process of a rank of a test; imports nothing of the rank's in the process of the tests. Not a test module."""

from __future__ import annotations

import os
from pathlib import Path


def run_rank(variables: dict[str, str], scenarios: str, folder: Path, log: Path) -> None:
    """Body of the process; what it prints goes to `log`."""
    os.environ.update(variables)
    with log.open("w") as out:
        os.dup2(out.fileno(), 1)
        os.dup2(out.fileno(), 2)
    from tests.trainer.rank_main import main

    main(scenarios.split(","), folder)
