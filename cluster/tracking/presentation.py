"""Presentation of a run in MLflow's UI: its user, command, description and parent run."""

from __future__ import annotations

import getpass
import logging
import os
import re
import shlex
import sys
from collections.abc import Mapping, Sequence

import mlflow
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException

from m2f.cluster.recipe.config import RunConfig
from m2f.cluster.tracking.provenance import DataInput
from m2f.cluster.tracking.store import TrackingError, canonical_uri, text_condition
from m2f.data_pipeline.urls import without_secrets

LOGGER = logging.getLogger(__name__)
EXPERIMENT_KIND = "mlflow.experimentKind"
MODEL_TRAINING = "custom_model_development"
"""Value of the tag EXPERIMENT_KIND that makes the UI open an experiment on runs and models instead of GenAI traces.

In MLflow 3.17, the UI's own switch between GenAI and model training takes precedence.
"""
PARENT_TAG = "mlflow.parentRunId"
_RUN_ID = re.compile(r"[0-9a-f]{32}")


def ui_tags(config: RunConfig, facts: Mapping[str, str], inputs: Sequence[DataInput]) -> dict[str, str]:
    """Return the tags that MLflow's UI shows: user, source, commit and description of the run."""
    tags = {
        "mlflow.user": _user(),
        "mlflow.source.name": _command(),
        "mlflow.source.type": "LOCAL",
        "mlflow.note.content": description(config, inputs),
    }
    if "code.commit" in facts:
        tags["mlflow.source.git.commit"] = facts["code.commit"]
    if "code.branch" in facts:
        tags["mlflow.source.git.branch"] = facts["code.branch"]
    if "code.changed_files" in facts:
        tags["mlflow.source.git.dirty"] = str(facts["code.changed_files"] != "0").lower()
    return tags


def description(config: RunConfig, inputs: Sequence[DataInput]) -> str:
    """Return the description of a run in Markdown: its model, data sets and run folder."""
    backbone = config.model.backbone
    lines = [
        f"Mask2Former for {config.data.task} segmentation, backbone `{getattr(backbone, 'name', backbone.kind)}`, "
        f"{config.training.max_steps or '?'} steps of {config.training.global_batch} images.",
        "",
        *(f"- {entry.context} data `{entry.name}`: {entry.images:,} images in `{entry.url}`" for entry in inputs),
        f"- run folder: `{config.run_folder}`",
        "",
        f"Predict with `m2f predict {config.run_folder} IMAGE --output DIR`, "
        f"register a checkpoint with `m2f register {config.run_folder} --name NAME --alias champion`.",
    ]
    return "\n".join(lines)


def parent_run(client: MlflowClient, experiment: str, parent: str | None, uri: str) -> str | None:
    """Return the id of the parent of a new run; None for a run without a parent.

    `parent` is the id of a run, or a name. A name selects the oldest run of that name in the experiment; a missing one
    is created. Without `parent`, the parent is the run that this process has open in the same experiment, as with
    MLflow's nested runs. If that run is in another experiment or store, the reason is logged.

    Raises TrackingError if the experiment has no run of this id.
    """
    if parent is None:
        return _active_parent(client, experiment, uri)
    if _RUN_ID.fullmatch(parent):
        return _require_run(client, experiment, parent, uri)
    if (found := _oldest_run(client, experiment, parent)) is None:
        created = client.create_run(experiment, run_name=parent).info.run_id
        client.set_terminated(created)  # this run only groups other runs
        found = _oldest_run(client, experiment, parent) or created
        if found != created:  # another driver created it first
            client.delete_run(created)
    return found


def _active_parent(client: MlflowClient, experiment: str, uri: str) -> str | None:
    """Return the id of the run that this process has open; None, with a warning, if it cannot be the parent."""
    active = mlflow.active_run()
    if active is None:
        return None
    active_uri = canonical_uri(mlflow.get_tracking_uri())
    if active_uri != uri:
        place, remedy = f"the store {without_secrets(active_uri)}", "set tracking.uri to that store"
    elif active.info.experiment_id != experiment:
        name = client.get_experiment(active.info.experiment_id).name
        place, remedy = f"the experiment {name!r}", f"set tracking.experiment to {name!r}"
    else:
        return active.info.run_id
    LOGGER.warning(
        f"tracking: the open MLflow run {active.info.run_name} does not become the parent of this run, because it is "
        f"in {place}; {remedy} to make it the parent"
    )
    return None


def _require_run(client: MlflowClient, experiment: str, parent: str, uri: str) -> str:
    try:
        found = client.get_run(parent)
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        found = None
    if found is None or found.info.experiment_id != experiment:
        raise TrackingError(
            f"tracking.parent is {parent}, but the experiment of this run has no such run at {uri}; give the id of a "
            "run in that experiment, or a name"
        )
    return parent


def _oldest_run(client: MlflowClient, experiment: str, name: str) -> str | None:
    query = text_condition("attributes.run_name", name)
    found = client.search_runs([experiment], query, order_by=["attributes.start_time ASC"])
    return next((run.info.run_id for run in found if run.info.run_name == name), None)


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # in a container, the user may have no name
        return str(os.getuid())


def _command() -> str:
    """Return the command line of this process without secrets in URLs, at most 500 characters."""
    program = os.path.basename(sys.argv[0]) or "python"
    return shlex.join([program, *map(_redact, sys.argv[1:])])[:500]


def _redact(word: str) -> str:
    setting, equals, value = word.partition("=")
    return f"{without_secrets(setting)}{equals}{without_secrets(value)}"
