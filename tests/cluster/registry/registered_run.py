"""Create a run with two evaluated checkpoints of random weights, as input for `m2f register`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import save_file

from m2f.cluster.cli import main
from m2f.cluster.recipe.config import RunConfig
from m2f.cluster.recipe.identity import identity_of
from m2f.cluster.recipe.load import dump_recipe
from m2f.cluster.tracking.tracking import create_run
from m2f.data_pipeline.shards.manifest import Manifest
from m2f.data_pipeline.storage.storage import Storage
from m2f.model.mask2former import build_model
from m2f.trainer.checkpoint.folder import CheckpointManifest, checkpoint_url, file_entry
from m2f.trainer.checkpoint.identity import store_identity
from tests.cluster.tiny_run import small_sets, tiny_config

STEPS = (4, 8)


def make_run(folder: Path, database: bytes, name: str = "cells") -> RunConfig:
    """Create a run below `folder` with checkpoints evaluated on `val`, and return its configuration."""
    config = tiny_config(folder, name, small_sets(str(folder / "shards"), Storage()))
    tasks = replace(config.evaluation, tasks=("panoptic", "instance"), extra_metrics=(), panels=0)
    config = replace(config, evaluation=tasks)
    run_folder = Path(config.run_folder)
    run_folder.mkdir(parents=True)
    (run_folder / "recipe.yaml").write_text(dump_recipe(config))
    (folder / "runs" / "mlflow.db").write_bytes(database)
    create_run(config)
    for step in STEPS:
        write_checkpoint(config, step)
        assert main(["eval", config.run_folder, "--checkpoint", str(step)]) == 0
    return config


def write_checkpoint(config: RunConfig, step: int) -> None:
    """Write a checkpoint of random weights, with the step as seed."""
    classes = Manifest.load(config.datasets["train"].shards, Storage()).categories.for_task("panoptic")
    torch.manual_seed(step)
    model = build_model(replace(config.model, num_classes=len(classes)), pretrained_backbone=False)
    folder = Path(checkpoint_url(config.run_folder, step, 1))
    folder.mkdir(parents=True)
    metadata = store_identity(folder, identity_of(config, classes))
    save_file(
        {name: tensor.contiguous() for name, tensor in model.state_dict().items()},
        folder / "weights.safetensors",
        metadata,
    )
    (folder / "recipe.yaml").write_text(dump_recipe(config))
    (folder / "engine").mkdir()
    (folder / "engine" / "state.pt").write_bytes(b"not for a registry")
    files = {str(path.relative_to(folder)): file_entry(path) for path in folder.rglob("*") if path.is_file()}
    (folder / "manifest.json").write_bytes(CheckpointManifest(step, 1, 1, files).to_json())
