"""Looks at the devices and the stored run, and says what `auto` means for a run before it starts."""

from __future__ import annotations

from typing import get_args

from m2f.cluster.recipe.config import RunConfig
from m2f.cluster.recipe.devices import SeenDevices, announced, gpus_of_machine, settle
from m2f.cluster.terminal import print_err
from m2f.cluster.train.continuation import newest_recipe
from m2f.data_pipeline.documents import DocumentError, parse_yaml
from m2f.data_pipeline.storage.storage import Storage
from m2f.trainer.config import Precision


def settled_run(config: RunConfig, seen: SeenDevices, *, beside: bool) -> RunConfig:
    """The run as it will be, printed in a line; see `settle`. A run that goes on keeps its precision."""
    stored = stored_precision(config) if config.training.precision == "auto" else None
    return announced(settle(config, seen, stored, beside=beside))


def this_machine() -> SeenDevices:
    """The devices that torch sees here."""
    return SeenDevices(gpus_of_machine())


def stored_precision(config: RunConfig) -> Precision | None:
    """Precision of the newest checkpoint of the run; None without one, or where it does not say."""
    recipe = newest_recipe(Storage(config.storage, on_wait=print_err), config.run_folder)
    if recipe is None:
        return None
    try:
        found = parse_yaml(recipe)["training"]["precision"]
    except (DocumentError, LookupError, TypeError):
        return None
    return found if found in get_args(Precision) else None
