"""How a run looks in MLflow's pages: who started it, with which command, what it is, and below which run it stands."""

from __future__ import annotations

import getpass
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
from m2f.cluster.tracking.store import TrackingError
from m2f.data_pipeline.urls import without_secrets

EXPERIMENT_KIND = "mlflow.experimentKind"
MODEL_TRAINING = "custom_model_development"
"""Value of the tag above with which the pages of an experiment open on runs and models, not on chat traces.

MLflow 3.17 goes by its switch between GenAI and model training first.
"""
PARENT_TAG = "mlflow.parentRunId"
_RUN_ID = re.compile(r"[0-9a-f]{32}")


def shown_tags(config: RunConfig, facts: Mapping[str, str], inputs: Sequence[DataInput]) -> dict[str, str]:
    """Tags under the names that MLflow's pages show: user, source, commit and the note of the run."""
    tags = {
        "mlflow.user": _user(),
        "mlflow.source.name": _command(),
        "mlflow.source.type": "LOCAL",
        "mlflow.note.content": note(config, inputs),
    }
    if "code.commit" in facts:
        tags["mlflow.source.git.commit"] = facts["code.commit"]
    if "code.branch" in facts:
        tags["mlflow.source.git.branch"] = facts["code.branch"]
    if "code.changed_files" in facts:
        tags["mlflow.source.git.dirty"] = str(facts["code.changed_files"] != "0").lower()
    return tags


def note(config: RunConfig, inputs: Sequence[DataInput]) -> str:
    """The description of a run in Markdown: what is trained on what, and where its files are."""
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


def parent_run(client: MlflowClient, experiment: str, wanted: str | None, uri: str) -> str | None:
    """Id of the run below which a new run is shown; None for a run that stands alone.

    `wanted` is an id, or a name: the oldest run of this name in the experiment, which is made where there is none.
    Without it, a run that this process has open in the same experiment is the parent, as with MLflow's own nested runs.

    Raises TrackingError for an id that the experiment does not have.
    """
    if wanted is None:
        active = mlflow.active_run()
        if active is None or active.info.experiment_id != experiment or mlflow.get_tracking_uri() != uri:
            return None
        return active.info.run_id
    if _RUN_ID.fullmatch(wanted):
        return _run_of_id(client, experiment, wanted, uri)
    if (found := _oldest(client, experiment, wanted)) is None:
        made = client.create_run(experiment, run_name=wanted).info.run_id
        client.set_terminated(made)  # it only groups others
        found = _oldest(client, experiment, wanted) or made
        if found != made:  # another driver was faster
            client.delete_run(made)
    return found


def _run_of_id(client: MlflowClient, experiment: str, wanted: str, uri: str) -> str:
    try:
        found = client.get_run(wanted)
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        found = None
    if found is None or found.info.experiment_id != experiment:
        raise TrackingError(
            f"tracking.parent is {wanted}, but the experiment of this run has no such run at {uri}; give the id of a "
            "run in it, or a name"
        )
    return wanted


def _oldest(client: MlflowClient, experiment: str, name: str) -> str | None:
    quote = '"' if "'" in name else "'"
    query = f"attributes.run_name = {quote}{name.replace(quote, '_')}{quote}"
    found = client.search_runs([experiment], query, max_results=1, order_by=["attributes.start_time ASC"])
    return found[0].info.run_id if found else None


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container whose user has no name
        return str(os.getuid())


def _command() -> str:
    """The command line of this process, without what URLs in it must not show."""
    program = os.path.basename(sys.argv[0]) or "python"
    return shlex.join([program, *map(_harmless, sys.argv[1:])])[:500]


def _harmless(word: str) -> str:
    setting, equals, value = word.partition("=")
    return f"{without_secrets(setting)}{equals}{without_secrets(value)}"
