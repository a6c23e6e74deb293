"""Read the records of runs for a comparison, from MLflow or from run folders."""

from __future__ import annotations

import difflib
import math
import os
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from mlflow import MlflowClient
from mlflow.entities import Run
from mlflow.exceptions import MlflowException

from m2f.cluster.compare.errors import CompareError
from m2f.cluster.compare.set_result import SetResult, parse_results
from m2f.cluster.evaluation.queue import read_entries
from m2f.cluster.recipe.load import flatten_tree
from m2f.cluster.recipe.stored import trained_recipe_url
from m2f.cluster.tracking.database import schema_problem
from m2f.cluster.tracking.local_store import current_uri, moved_artifacts
from m2f.cluster.tracking.reporter import tracked_name
from m2f.cluster.tracking.store import brief, connect, text_condition
from m2f.data_pipeline.documents import parse_json, parse_yaml
from m2f.data_pipeline.errors import StorageError
from m2f.data_pipeline.storage.scratch import ScratchFolder
from m2f.data_pipeline.storage.storage import Storage, join
from m2f.data_pipeline.urls import without_secrets
from m2f.eval.errors import EvaluationError
from m2f.eval.results.images import IMAGES_FILE, ImageRecords, read_image_records
from m2f.model.errors import UserError
from m2f.trainer.checkpoint.commits import read_metrics
from m2f.trainer.checkpoint.folder import AVERAGE, WEIGHTS, list_checkpoints, read_manifest
from m2f.trainer.errors import TrainingError

Curve = tuple[tuple[int, float], ...]
"""(step, value) points in ascending order of steps, one per step."""
EXCLUDED_METRICS = {"train/eta_s", "train/images"}
"""Metrics that are not compared, because they say nothing about the quality or speed of a run."""
EXCLUDED_PREFIXES = ("train/storage/", "train/ranks/", "system/")
"""Name prefixes of further metrics that are not compared."""
MAX_RUNS = 50
"""Maximum number of runs that a filter or an experiment selects."""


@dataclass(frozen=True, kw_only=True)
class RunRecord:
    """Data of one run that a comparison uses."""

    name: str
    source: str
    """Run folder, or run id and tracking server."""
    status: str | None = None
    """Status in MLflow; None if MLflow was not read."""
    version: str | None = None
    """Version of m2f; None if it is not known."""
    recipe: Mapping[str, str] = field(default_factory=dict)
    """Resolved settings by dotted path."""
    curves: Mapping[str, Curve] = field(default_factory=dict)
    """Curves by name, `train/...` or `<set>/<metric>`; `is_training_metric` distinguishes the two."""
    results: Mapping[str, SetResult] = field(default_factory=dict)
    """Results at the compared step, by set. A set without results.json is missing."""
    images: Mapping[str, ImageRecords] = field(default_factory=dict)
    """Image records at the compared step, by set. Results of earlier versions have none."""
    is_selected: bool = False
    """Whether a filter or an experiment selected the run, which is then left out if it has nothing to compare."""
    notes: tuple[str, ...] = ()
    """Messages about files that could not be read and results that are left out, with the reason."""


def read_runs(
    requested: Sequence[str], *, tracking: str | None, experiment: str | None, query: str | None, step: int | None
) -> list[RunRecord]:
    """Read the `requested` runs in their order, then the runs that match `query`, newest first.

    Args:
        requested: paths or URLs of run folders, or MLflow run ids or names.
        tracking: URI of the MLflow server; None takes MLFLOW_TRACKING_URI.
        experiment: MLflow experiment in which names are looked up. Without `requested` and `query`, its newest runs are
            read.
        query: filter in MLflow's search syntax, for example `metrics."val/PQ" > 50`.
        step: step of the evaluations; None takes the newest one of each run and set.

    Raises:
        CompareError: a run or experiment does not exist, the filter is invalid, or the server does not answer.
    """
    uri = tracking or os.environ.get("MLFLOW_TRACKING_URI")
    by_filter = query is not None or (experiment is not None and not requested)
    records: list[RunRecord] = []
    store: _Store | None = None
    for requested_run in requested:
        if _is_run_folder(requested_run):
            records.append(_read_folder(requested_run, step))
        else:
            store = store or _open_store(uri, requested_run, experiment)
            records.append(store.read(store.find(requested_run), step))
    if by_filter:
        store = store or _open_store(uri, experiment or "m2f", experiment)
        records += [replace(store.read(run, step), is_selected=True) for run in store.search(query)]
    if not records:
        raise CompareError("no run to compare; give run folders, MLflow runs or an --experiment")
    return _with_distinct_names(records)


class _Store:
    """Reads runs from one MLflow server or database."""

    def __init__(self, uri: str, experiment: str | None) -> None:
        self.uri = uri
        self._client: MlflowClient = connect(uri)
        with _convert_mlflow_errors(uri):
            known = {e.name: e.experiment_id for e in self._client.search_experiments()}
        if experiment is not None and experiment not in known:
            raise CompareError(f"no experiment {experiment!r} at {uri}{_suggestion(experiment, known)}")
        self._experiments = [known[experiment]] if experiment is not None else list(known.values())

    def find(self, name_or_id: str) -> Run:
        """Return the run with this name in the experiments, else the run with this id."""
        with _convert_mlflow_errors(self.uri):
            found = self._client.search_runs(self._experiments, text_condition("attributes.run_name", name_or_id))
            named = [run for run in found if run.info.run_name == name_or_id]
            if not named and len(name_or_id) == 32:
                try:
                    return self._client.get_run(name_or_id)
                except MlflowException as error:
                    if error.error_code not in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
                        raise
            others = [] if named else self._client.search_runs(self._experiments, max_results=1000)
        if len(named) > 1:
            ids = ", ".join(run.info.run_id for run in named[:10])
            raise CompareError(f"{len(named)} runs at {self.uri} have the name {name_or_id!r}; give an id: {ids}")
        if not named:
            names = sorted({run.info.run_name or run.info.run_id for run in others})
            suggestion = _suggestion(name_or_id, names)
            raise CompareError(f"no run folder, run id or run name {name_or_id!r} at {self.uri}{suggestion}")
        return named[0]

    def search(self, query: str | None) -> list[Run]:
        """Return at most MAX_RUNS runs of the experiments that match the filter, newest first."""
        with _convert_mlflow_errors(self.uri):
            try:
                runs = self._client.search_runs(self._experiments, query or "", max_results=MAX_RUNS)
            except MlflowException as error:
                if error.error_code != "INVALID_PARAMETER_VALUE":
                    raise
                raise CompareError(f"--filter is {query!r}: {error.message}") from error
        if not runs:
            raise CompareError(
                f"no run at {self.uri} matches the filter {query!r}" if query else "the experiment has no runs"
            )
        return list(runs)

    def read(self, run: Run, step: int | None) -> RunRecord:
        """Return the record of a run: recipe, curves, results and image records, as MLflow stores them."""
        run_id = run.info.run_id
        curves = self.curves(run)
        notes: list[str] = []
        recipe = self._artifact(run, "recipe.yaml", notes)
        results: dict[str, SetResult] = {}
        images: dict[str, ImageRecords] = {}
        for name in dict.fromkeys(split_metric_name(key)[0] for key in curves if not is_training_metric(key)):
            evaluated_step = compared_step(name, curves, step)
            if evaluated_step is None:
                continue
            folder = f"evaluations/step_{evaluated_step:08d}/{name}"
            if (text := self._artifact(run, f"{folder}/results.json", notes)) is not None:
                results[name] = parse_results(text, f"{folder}/results.json of run {run_id}")
                if (records := self._images(run, folder, notes)) is not None:
                    images[name] = records
        return RunRecord(
            name=run.info.run_name or run_id,
            source=f"run {run_id} at {self.uri}",
            status=run.info.status,
            version=run.data.tags.get("m2f.version"),
            recipe=flatten_tree(parse_yaml(recipe)) if recipe is not None else flatten_tree(run.data.params),
            curves=curves,
            results=results,
            images=images,
            notes=tuple(notes),
        )

    def curves(self, run: Run) -> dict[str, Curve]:
        """Return the history of every compared metric."""
        with _convert_mlflow_errors(self.uri):
            keys = [key for key in run.data.metrics if not key.startswith(EXCLUDED_PREFIXES)]
            compared = [key for key in keys if key not in EXCLUDED_METRICS]
            return {key: self._curve(run.info.run_id, key) for key in compared}

    def _curve(self, run_id: str, key: str) -> Curve:
        by_step = {point.step: _with_infinity(point.value) for point in self._client.get_metric_history(run_id, key)}
        return tuple(sorted(by_step.items()))

    def _images(self, run: Run, folder: str, notes: list[str]) -> ImageRecords | None:
        """Return the image records beside results.json; None if missing, as in earlier versions, or unreadable."""
        path = f"{folder}/{IMAGES_FILE}"
        try:
            if (moved := moved_artifacts(self.uri, run.info.artifact_uri)) is not None:
                exists = (moved / path).exists()
            else:
                exists = path in {file.path for file in self._client.list_artifacts(run.info.run_id, folder)}
        except Exception as error:
            notes.append(f"{folder} cannot be listed ({brief(error)})")
            return None
        payload = self._artifact(run, path, notes) if exists else None
        return None if payload is None else _parse_images(payload, path, notes)

    def _artifact(self, run: Run, path: str, notes: list[str]) -> bytes | None:
        try:
            if (moved := moved_artifacts(self.uri, run.info.artifact_uri)) is not None:
                return (moved / path).read_bytes()
            with ScratchFolder("compare") as folder:
                local = self._client.download_artifacts(run.info.run_id, path, str(folder))
                return Path(local).read_bytes()
        except Exception as error:  # artifact stores may raise any type; the rest of the run is still shown
            notes.append(f"{path} cannot be read ({brief(error)})")
            return None


def _with_infinity(value: float) -> float:
    """Return the value, or infinity for the largest float, which MLflow's databases store instead."""
    return math.copysign(math.inf, value) if abs(value) >= sys.float_info.max else value


def _open_store(uri: str | None, name_or_id: str, experiment: str | None) -> _Store:
    if uri is None:
        raise CompareError(
            f"{name_or_id!r} is not a run folder (it has no recipe.yaml), and no MLflow server is set; give a run "
            "folder, or set --tracking or MLFLOW_TRACKING_URI"
        )
    database = uri.removeprefix("sqlite:///")
    if database != uri and not Path(database).exists():
        raise CompareError(f"the MLflow database {database} does not exist")  # MLflow would create an empty database
    if database != uri and (problem := schema_problem(Path(database))) is not None:
        raise CompareError(problem)  # MLflow would migrate its tables
    return _Store(uri, experiment)


@contextmanager
def _convert_mlflow_errors(uri: str) -> Iterator[None]:
    """Convert exceptions in the block to a CompareError."""
    try:
        yield
    except CompareError:
        raise
    except Exception as error:
        raise CompareError(
            f"{uri} does not answer ({brief(error)}); start the server, correct --tracking or MLFLOW_TRACKING_URI, "
            "or compare run folders"
        ) from error


# Run folders


def _is_run_folder(path: str) -> bool:
    # Only a URL at the start counts: the source of a run that was read from MLflow ends with the URL of the server.
    return re.match(r"\w+://", path) is not None or Path(path, "recipe.yaml").is_file()


def _read_folder(folder: str, step: int | None) -> RunRecord:
    """Read a run folder: recipe and evaluations from its files, and training curves from its MLflow run.

    If the MLflow run is unknown or MLflow does not answer, the training curves come from the folder, too.
    """
    storage = Storage()
    folder = folder.rstrip("/")
    omitted: list[str] = []
    try:
        recipe = flatten_tree(parse_yaml(storage.get(trained_recipe_url(storage, folder, step))))
        found = _folder_results(storage, folder, omitted)
        record_url = join(folder, "tracking.json")
        tracking_record = parse_json(storage.get(record_url)) if storage.exists(record_url) else None
    except UserError as error:
        raise CompareError(f"{folder} cannot be read as a run folder: {error}") from error
    record = _tracked_record(storage, folder, tracking_record)
    points: dict[str, dict[int, float]] = {}
    for (_, name, result_step), result in found.items():
        for metric, value in result.metrics.items():
            if value is not None:
                points.setdefault(f"{name}/{metric}", {})[result_step] = value
    curves = dict(record.curves) | {key: tuple(sorted(values.items())) for key, values in points.items()}
    compared = {
        name: (url, result)
        for (url, name, result_step), result in found.items()
        if result_step == compared_step(name, curves, step)
    }
    notes = [*record.notes, *omitted]
    return replace(
        record,
        name=recipe.get("name", folder),
        recipe=recipe,
        curves=curves,
        results={name: result for name, (_, result) in compared.items()},
        images=_folder_images(storage, {name: url for name, (url, _) in compared.items()}, notes),
        notes=tuple(notes),
    )


def _folder_results(storage: Storage, folder: str, notes: list[str]) -> dict[tuple[str, str, int], SetResult]:
    """Return the results of the run's checkpoints by URL, set and step.

    Results of other weights, and of checkpoints that a rollback discarded, are left out with a note. If training
    reached such a step again, results of its new checkpoint are used.
    """
    evaluations = join(folder, "evaluations")
    urls = [url for url in storage.list(evaluations) if url.endswith("/results.json")]
    found, others, withdrawn = {}, set[str](), set[int]()
    current = _weights_of_withdrawn_steps(storage, folder, notes)
    for url in urls:
        result = parse_results(storage.get(url), url)
        results_folder, name, _ = url.rsplit("/", 2)
        weights = (result.settings or {}).get("weights")
        if result.step is None:
            others.add(results_folder)
        elif result.step in current and (weights is None or weights != current[result.step]):
            withdrawn.add(result.step)
        else:
            found[url, name, result.step] = result
    if others:
        notes.append(f"not compared, because the weights are not a checkpoint of the run: {', '.join(sorted(others))}")
    if withdrawn:
        steps = ", ".join(map(str, sorted(withdrawn)))
        notes.append(f"not compared, because the run restarted from an earlier checkpoint: results of step {steps}")
    return found


def _weights_of_withdrawn_steps(storage: Storage, folder: str, notes: list[str]) -> dict[int, str | None]:
    """Return the steps whose stored results may belong to discarded weights, with the digest of their current weights.

    The digest is the SHA-256 in the manifest of the step's checkpoint; None if it is missing or cannot be read. A
    damaged queue gives no steps, and a note.
    """
    try:
        entries = read_entries(storage, join(folder, "evaluations", "queue.json"))
    except EvaluationError as error:
        notes.append(str(error))
        return {}
    steps = {status: {e.step for e in entries if e.status == status} for status in ("withdrawn", "published")}
    weights: dict[int, str | None] = dict.fromkeys(steps["withdrawn"] - steps["published"])
    for checkpoint in list_checkpoints(storage, folder) if weights else ():
        if checkpoint.step in weights:
            with suppress(TrainingError):  # damaged, or written by a newer version
                files = read_manifest(storage, checkpoint.url).files
                sums = [files[name].sha256 for name in (AVERAGE, WEIGHTS) if name in files]
                weights[checkpoint.step] = next(iter(sums), None)
    return weights


def _folder_images(storage: Storage, results: Mapping[str, str], notes: list[str]) -> dict[str, ImageRecords]:
    """Return the image records beside each results.json, by set. Results of earlier versions have none."""
    images = {}
    for name, url in results.items():
        images_url = join(url.rpartition("/")[0], IMAGES_FILE)
        try:
            payload = storage.get(images_url) if storage.exists(images_url) else None
        except StorageError as error:
            notes.append(f"{images_url} cannot be read ({brief(error)})")
            continue
        if payload is not None and (records := _parse_images(payload, images_url, notes)) is not None:
            images[name] = records
    return images


def _parse_images(payload: bytes, where: str, notes: list[str]) -> ImageRecords | None:
    try:
        return read_image_records(payload)
    except EvaluationError as error:
        notes.append(f"{where} cannot be read ({brief(error)})")
        return None


def _tracked_record(storage: Storage, folder: str, known: Any) -> RunRecord:
    """Return status, version and training curves from MLflow. If that fails, return only the curves in the folder.

    `known` is the content of tracking.json; None if there is none.
    """
    untracked = RunRecord(name=folder, source=folder)
    match known:
        case {"uri": str(stored_uri), "run_id": str(run_id)}:
            pass
        case _:
            reason = "no tracking.json" if known is None else "tracking.json lacks `uri` or `run_id`"
            note = f"{reason}, so its MLflow run is unknown"
            return replace(untracked, curves=_stored_curves(storage, folder), notes=(note,))
    try:
        store = _open_store(current_uri(folder, without_secrets(stored_uri), run_id), run_id, None)
        run = store.find(run_id)
        version = run.data.tags.get("m2f.version")
        return replace(untracked, status=run.info.status, version=version, curves=store.curves(run))
    except CompareError as error:
        curves = _stored_curves(storage, folder)
        found = "training curves are read from the run folder" if curves else "no training curves"
        return replace(untracked, curves=curves, notes=(f"{found}: {error}",))


def _stored_curves(storage: Storage, folder: str) -> dict[str, Curve]:
    """Return the curves of the compared metrics from `metrics/` in a run folder."""
    points: dict[str, dict[int, float]] = {}
    for _, by_step in read_metrics(storage, folder):
        for step, values in by_step.items():
            for name, value in values.items():
                key = tracked_name(name)
                if key not in EXCLUDED_METRICS and not key.startswith(EXCLUDED_PREFIXES):
                    points.setdefault(key, {})[step] = value
    return {key: tuple(sorted(values.items())) for key, values in points.items()}


def split_metric_name(key: str) -> tuple[str, str]:
    """Split a name such as `val/PQ` into set and metric: (`val`, `PQ`)."""
    name, _, metric = key.rpartition("/")
    return name, metric


def is_training_metric(key: str) -> bool:
    """Return whether training logged the metric.

    An evaluation set may also be called `train`; the names of its metrics contain capitals.
    """
    name, metric = split_metric_name(key)
    return key.startswith("train/") and (name != "train" or metric.islower())


def compared_step(dataset: str, curves: Mapping[str, Curve], requested: int | None) -> int | None:
    """Return `requested`, or the newest evaluated step if it is None. Return None if the set has no such evaluation."""
    evaluated = [key for key in curves if split_metric_name(key)[0] == dataset and not is_training_metric(key)]
    steps = {step for key in evaluated for step, _ in curves[key]}
    if requested is not None:
        return requested if requested in steps else None
    return max(steps, default=None)


def _with_distinct_names(records: Sequence[RunRecord]) -> list[RunRecord]:
    """Return the records with distinct names.

    If names clash, runs are named after their folders if these differ. Otherwise runs with equal names get their
    position in the comparison appended.
    """
    names = [record.name for record in records]
    if len(set(names)) < len(names):
        folders = [record.source.rstrip("/").rpartition("/")[2] for record in records]
        if len(set(folders)) == len(folders) and all(_is_run_folder(record.source) for record in records):
            return [replace(record, name=folder) for record, folder in zip(records, folders, strict=True)]
    return [
        replace(record, name=f"{record.name} ({position})") if names.count(record.name) > 1 else record
        for position, record in enumerate(records, start=1)
    ]


def _suggestion(name: str, known: Sequence[str] | Mapping[str, Any]) -> str:
    names = list(known)
    close = difflib.get_close_matches(name, names, n=1)
    if close:
        return f"; did you mean {close[0]!r}?"
    return f" (available: {', '.join(names[:10])}{', ...' if len(names) > 10 else ''})" if names else " (it is empty)"
