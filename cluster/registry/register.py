"""`m2f register`: register a checkpoint of a run as a model version in MLflow, with everything needed to serve it."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

from mlflow.entities import LoggedModel
from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException
from mlflow.models import Model

from m2f.cluster.api.thresholds import Thresholds, choose_thresholds
from m2f.cluster.compare.records import RunRecord, read_runs
from m2f.cluster.evaluation.choice import HEADLINE
from m2f.cluster.evaluation.publication import evaluated_checkpoint, read_set_metrics
from m2f.cluster.evaluation.queue import Entry, queue_url, read_entries
from m2f.cluster.predict.choose_checkpoint import ChosenWeights, choose_checkpoint, open_recipe
from m2f.cluster.predict.trained_model import open_trained
from m2f.cluster.recipe.config import RunConfig
from m2f.cluster.registry.comparison import RegistryError, Verdict, check_weights, compare_checkpoints
from m2f.cluster.registry.package import PackageContent, build_package, package_digest
from m2f.cluster.tracking.logged_models import EXTERNAL_TAG, EvaluatedCheckpoint, LoggedModels
from m2f.cluster.tracking.registered import find_version, registry_client, using_store
from m2f.cluster.tracking.store import TrackingError, brief, long_requests, text_condition
from m2f.cluster.tracking.tracked_run import TrackedRun
from m2f.cluster.tracking.tracking import Tracking, find_run
from m2f.data_pipeline.documents import parse_json
from m2f.data_pipeline.storage.scratch import ScratchFolder
from m2f.data_pipeline.storage.storage import Storage
from m2f.model.errors import ConfigError
from m2f.trainer.checkpoint.folder import pin, pins, unpin

REGISTERED_PIN = "registered"
"""Pin that keeps a registered checkpoint from being deleted. It is not removed automatically."""
PACKAGE_TAG = "m2f.package"
"""Tag of a logged model and of a version: digest of the uploaded contents."""
VERSIONS_TAG = "mlflow.modelVersions"
"""Tag of a logged model that lists its registered versions for MLflow's web pages."""
TRACKING_CLOSE_TIMEOUT_S = 60.0
"""Seconds to wait until the metrics of an evaluation are logged."""
_STORE_PREFIXES = ("tracking.", "storage.")
"""Prefixes of settings that do not affect the model."""
RUN_TAG, STEP_TAG, COMMIT_TAG = "m2f.run_id", "m2f.step", "m2f.commit"
WEIGHTS_TAG = "m2f.weights.sha256"


@dataclass(frozen=True, kw_only=True)
class RegisterOptions:
    """Options of `m2f register`: what to register, and under which condition."""

    source: str
    """Run folder or recipe."""
    overrides: tuple[str, ...] = ()
    checkpoint: str = "best"
    """`best`, `last` or a step."""
    name: str | None = None
    """Name of the registered model; None takes the name of the run."""
    aliases: tuple[str, ...] = ()
    if_better: str | None = None
    """Alias of the version that the checkpoint must beat; None registers it without a comparison."""
    dataset: str | None = None
    """Label of the evaluation set; None takes the first one of the recipe."""
    metric: str | None = None
    """Metric of the comparison, `PQ`, `AP` or `mIoU`; None takes the first one that both sides have."""
    precision: float | None = None
    """Precision for which thresholds by class are chosen, above 0 and at most 1; None: no thresholds."""
    allowed_hosts: tuple[str, ...] = ()
    """Hosts from which the served model downloads images."""


@dataclass(frozen=True, kw_only=True)
class RegistrationResult:
    """Outcome of a call of `register`."""

    name: str
    version: str | None
    """Version of the model; None if the checkpoint is not better and was not registered."""
    step: int
    uploaded: bool
    """Whether the contents were uploaded. False if they were already there, or if nothing was registered."""
    verdict: Verdict | None
    """Result of the comparison; None if there was none."""
    thresholds: Thresholds | None
    store: str
    """URI of the MLflow server."""


def register(options: RegisterOptions, report: Callable[[str], None] = lambda line: None) -> RegistrationResult:
    """Register a checkpoint. `report` is called with a line of text before each step that takes long.

    Raises:
        RegistryError: the run is not in MLflow, the source is not a run, the checkpoint was not evaluated on `dataset`,
            or its results are missing or cannot be compared with those of the version `if_better`.
        ConfigError: MLflow would refuse the name or an alias, a setting has no effect, or the run cannot be read.
        CheckpointError, DataError, StorageError: the run or the checkpoint cannot be read.
        TrackingError: the MLflow store does not answer, or refuses the registration.
    """
    _check_overrides(options.overrides)
    _check_names(options)
    config, checkpoint_url = open_recipe(options.source, options.overrides)
    if checkpoint_url is not None:
        raise RegistryError(f"{options.source} is a checkpoint; give its run, and select the step with --checkpoint N")
    storage = Storage(config.storage)
    chosen = choose_checkpoint(config, storage, options.checkpoint)
    if chosen.step is None:
        raise RegistryError(
            f"--checkpoint {options.checkpoint} is not a checkpoint of {config.run_folder}, and other "
            "weights cannot be registered; give best, last or a step"
        )
    run = find_run(config)
    if run is None:
        raise RegistryError(
            f"{config.run_folder} has no tracking.json, so its MLflow run is unknown; m2f train creates this "
            "file when it resumes the run"
        )
    with _convert_mlflow_errors(run.uri), using_store(run.uri):
        return _Registration(options, config, storage, chosen, chosen.step, run, report).run()


def _check_overrides(overrides: Sequence[str]) -> None:
    """Raise ConfigError for settings that have no effect, because a served model uses the recipe in its checkpoint."""
    ignored = [override for override in overrides if not override.lstrip("+").startswith(_STORE_PREFIXES)]
    if ignored:
        raise ConfigError(
            f"{', '.join(ignored)}: a registered model uses the settings that its checkpoint was trained with; "
            "only tracking.* and storage.* can be overridden"
        )


def _check_names(options: RegisterOptions) -> None:
    """Raise ConfigError for a name or alias that MLflow would refuse. MLflow checks them only after the upload."""
    aliases = [("--alias", alias) for alias in options.aliases]
    aliases += [] if options.if_better is None else [("--if-better", options.if_better)]
    for option, alias in aliases:
        if not re.fullmatch(r"[\w-]{1,255}", alias) or re.fullmatch(r"latest|v\d+", alias, re.IGNORECASE):
            raise ConfigError(
                f"{option} is {alias!r}; an alias has 1 to 255 letters, digits, '_' and '-', and is neither 'latest' "
                "nor 'v' with a number, such as 'v1'"
            )
    name = options.name
    if name and (not name.strip() or re.search("[/:]", name) or name == "." or name.startswith("..")):
        raise ConfigError(
            f"--name is {name!r}; names contain neither '/' nor ':', are not blank or '.', and do not start with '..'"
        )


class _Registration:
    """State of one call of `register`."""

    def __init__(
        self,
        options: RegisterOptions,
        config: RunConfig,
        storage: Storage,
        chosen: ChosenWeights,
        step: int,
        run: TrackedRun,
        report: Callable[[str], None],
    ) -> None:
        self._options, self._config, self._storage, self._run, self._report = options, config, storage, run, report
        self._chosen, self._step = chosen, step
        self._checkpoint = evaluated_checkpoint(config, storage, chosen.url, step)
        self._name = options.name or config.name
        self._client = registry_client(run.uri)
        labels = [evaluation_set.label for evaluation_set in config.evaluation.sets]
        self._dataset = options.dataset or (labels[0] if labels else None)
        needs_results = any(option is not None for option in (options.dataset, options.precision, options.if_better))
        self._record = self._read_candidate() if needs_results else None

    def run(self) -> RegistrationResult:
        """Compare, pin, upload and register, in this order. Nothing is written if the checkpoint is not better."""
        verdict = self._compare()
        thresholds = self._choose_thresholds()
        if verdict is not None and not verdict.better:
            return self._result(None, False, verdict, thresholds)
        with self._pinned():
            self._log_metrics()
            digest = package_digest(self._chosen.url, thresholds, self._options.allowed_hosts, self._storage)
            model, uploaded = self._find_or_upload_model(digest, thresholds)
            version = self._find_or_create_version(model, digest, verdict, thresholds)
        moved_alias = [self._options.if_better] if self._options.if_better else []
        for alias in dict.fromkeys([*self._options.aliases, *moved_alias]):
            self._client.set_registered_model_alias(self._name, alias, version.version)
        return self._result(str(version.version), uploaded, verdict, thresholds)

    def _result(
        self, version: str | None, uploaded: bool, verdict: Verdict | None, thresholds: Thresholds | None
    ) -> RegistrationResult:
        return RegistrationResult(
            name=self._name,
            version=version,
            step=self._step,
            uploaded=uploaded,
            verdict=verdict,
            thresholds=thresholds,
            store=self._run.uri,
        )

    def _read_candidate(self) -> RunRecord:
        if self._dataset is None:
            raise RegistryError(
                "evaluation.sets is empty, so there are no results; evaluate with m2f eval, or give --set"
            )
        (record,) = read_runs(
            [self._config.run_folder], tracking=self._run.uri, experiment=None, query=None, step=self._step
        )
        if self._options.dataset is not None and self._dataset not in record.results:
            raise RegistryError(
                f"--set is {self._dataset}, but step {self._step} of {self._config.run_folder} was not evaluated on it "
                f"(sets: {', '.join(sorted(record.results)) or 'none'}); give one of these, or evaluate with m2f eval"
            )
        check_weights(record, self._dataset, self._step, self._checkpoint.weights)
        return record

    def _compare(self) -> Verdict | None:
        """Compare with the version of the alias. Return None if no comparison is wanted or no version has the alias."""
        alias = self._options.if_better
        if alias is None or self._record is None or self._dataset is None:
            return None
        version = find_version(self._client, self._name, alias)
        if version is None:
            self._report(f"no version of {self._name} has the alias {alias} yet, so there is nothing to compare with")
            return None
        tags = version.tags
        if RUN_TAG not in tags or STEP_TAG not in tags:
            raise RegistryError(
                f"{self._name}@{alias} was not registered by m2f register, so its results are unknown; move the "
                "alias to a version that m2f register created"
            )
        self._report(f"comparing with {self._name}@{alias}, version {version.version}")
        (champion,) = read_runs(
            [tags[RUN_TAG]], tracking=self._run.uri, experiment=None, query=None, step=int(tags[STEP_TAG])
        )
        named = replace(champion, name=f"{alias} (version {version.version})")
        check_weights(named, self._dataset, int(tags[STEP_TAG]), tags.get(WEIGHTS_TAG))
        return compare_checkpoints(named, self._record, self._dataset, self._options.metric)

    def _choose_thresholds(self) -> Thresholds | None:
        if self._options.precision is None or self._record is None or self._dataset is None:
            return None
        found, images = self._record.results.get(self._dataset), self._record.images.get(self._dataset)
        if found is None or images is None or images.instance is None:
            raise RegistryError(
                f"--precision needs detections of the set {self._dataset} at step {self._step}; evaluate the "
                "checkpoint with m2f eval, with instance in evaluation.tasks"
            )
        names = [str(row["name"]) for row in found.per_class if row["is_thing"]]
        return Thresholds(
            precision=self._options.precision,
            dataset=self._dataset,
            fingerprint=found.fingerprint,
            classes=choose_thresholds(images.instance, names, self._options.precision),
        )

    @contextmanager
    def _pinned(self) -> Iterator[None]:
        """Pin the checkpoint against deletion. If the block fails, remove the pin unless it existed before."""
        was_pinned = REGISTERED_PIN in pins(self._storage, self._chosen.url)
        pin(self._storage, self._chosen.url, REGISTERED_PIN)
        try:
            yield
        except BaseException:
            if not was_pinned:
                unpin(self._storage, self._chosen.url, REGISTERED_PIN)
            raise

    def _log_metrics(self) -> None:
        """Add the metrics of the evaluation to the logged model, because earlier versions logged only curve points."""
        for entry in read_entries(self._storage, queue_url(self._config)):
            if entry.status == "published" and is_evaluation_of(entry, self._checkpoint):
                tracking = Tracking(self._run, "registration")
                tracking.log_evaluation(self._checkpoint, read_set_metrics(self._config, self._storage, entry))
                tracking.close(TRACKING_CLOSE_TIMEOUT_S)

    def _find_or_upload_model(self, digest: str, thresholds: Thresholds | None) -> tuple[LoggedModel, bool]:
        """Return the logged model with this content, uploading it if needed, and whether it was uploaded."""
        models, checkpoint = LoggedModels(self._client, self._run.run_id), self._checkpoint
        model = models.ensure(checkpoint)
        if model is None:
            raise RegistryError(f"{self._run.uri} does not support logged models; registering needs an MLflow 3 server")
        if (existing_model := models.find_tagged(checkpoint.commit, PACKAGE_TAG, digest)) is not None:
            return models.with_metrics_of(model, existing_model), False
        if PACKAGE_TAG in model.tags:  # it has different content, such as different thresholds or hosts
            another = models.create_another(checkpoint, f"{checkpoint.model_name}-{digest[:8]}")
            model = models.with_metrics_of(model, another)
        self._report(f"opening {self._chosen.url}")
        content = PackageContent(
            checkpoint=self._chosen.url,
            trained=open_trained(self._chosen.url, (), None, "cpu"),
            thresholds=thresholds,
            allowed_hosts=self._options.allowed_hosts,
        )
        mlflow_model = Model(
            artifact_path=model.artifact_location,
            model_uuid=model.model_id,
            run_id=self._run.run_id,
            model_id=model.model_id,
        )
        with ScratchFolder("register") as folder:
            package = build_package(content, folder, self._storage, mlflow_model)
            size = sum(path.stat().st_size for path in package.rglob("*") if path.is_file())
            self._report(f"uploading {size / 1e6:,.1f} MB to {self._run.uri}")
            with long_requests():  # a server may store a large file before it answers
                self._client.log_model_artifacts(model.model_id, str(package))
        if EXTERNAL_TAG in model.tags:
            self._client.delete_logged_model_tag(model.model_id, EXTERNAL_TAG)
        self._client.set_logged_model_tags(model.model_id, {PACKAGE_TAG: digest})
        return model, True

    def _find_or_create_version(
        self, model: LoggedModel, digest: str, verdict: Verdict | None, thresholds: Thresholds | None
    ) -> ModelVersion:
        """Return the version of the registered model with this content. Create it if it does not exist."""
        checkpoint = self._checkpoint
        try:
            self._client.create_registered_model(self._name)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
        for known in self._client.search_model_versions(text_condition("name", self._name)):
            content = known.name, known.tags.get(PACKAGE_TAG), known.tags.get(COMMIT_TAG)
            if content == (self._name, digest, checkpoint.commit):
                return known
        tags = {
            PACKAGE_TAG: digest,
            COMMIT_TAG: checkpoint.commit,
            RUN_TAG: self._run.run_id,
            STEP_TAG: str(checkpoint.step),
            "m2f.checkpoint.url": checkpoint.url,
            WEIGHTS_TAG: checkpoint.weights or "",
        }
        version = self._client.create_model_version(
            self._name,
            f"models:/{model.model_id}",
            self._run.run_id,
            tags,
            description=self._description(model, verdict, thresholds),
            model_id=model.model_id,
        )
        versions = parse_json(model.tags.get(VERSIONS_TAG, "[]"))
        versions.append({"name": self._name, "version": version.version})
        self._client.set_logged_model_tags(model.model_id, {VERSIONS_TAG: json.dumps(versions)})
        return version

    def _description(self, model: LoggedModel, verdict: Verdict | None, thresholds: Thresholds | None) -> str:
        """Return the Markdown description of a version for the registry's web page."""
        lines = [f"Step {self._step} of `{self._config.run_folder}`, {self._config.data.task} segmentation."]
        chosen = [m for m in model.metrics or () if m.key.rpartition("/")[2] in HEADLINE]
        lines += [f"- {m.key}: {m.value:.2f}" for m in sorted(chosen, key=lambda m: m.key)]
        if verdict is not None:
            lines += ["", f"{verdict}."]
        if thresholds is not None:
            unreachable_classes = [
                name for name, class_threshold in thresholds.classes.items() if class_threshold.threshold is None
            ]
            lines += ["", f"Thresholds by class for a precision of {thresholds.precision:g} on {thresholds.dataset}."]
            lines += [f"No threshold reaches it for: {', '.join(unreachable_classes)}."] if unreachable_classes else []
        return "\n".join(lines)


def is_evaluation_of(entry: Entry, checkpoint: EvaluatedCheckpoint) -> bool:
    """Return whether an evaluation belongs to a checkpoint, by commit, because a step may be trained again."""
    if not entry.commit:  # entries of version 0.1 have no commit
        return entry.step == checkpoint.step and entry.folder == checkpoint.name
    return entry.commit == checkpoint.commit


@contextmanager
def _convert_mlflow_errors(uri: str) -> Iterator[None]:
    """Convert MlflowException in the block to TrackingError."""
    try:
        yield
    except MlflowException as error:
        raise TrackingError(f"{uri}: the model cannot be registered ({brief(error)})") from error
