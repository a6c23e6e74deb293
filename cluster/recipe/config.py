"""RunConfig, the whole recipe. This module imports no Ray, MLflow or torch: the command line must start quickly."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Annotated, Literal

from m2f.cluster.recipe.metrics import metric_problems
from m2f.data_pipeline.config import DataConfig, DatasetConfig, ScaleJitter, StorageConfig
from m2f.data_pipeline.keys import key_problem
from m2f.data_pipeline.urls import REMEDY, url_problem
from m2f.eval.config import EvaluationConfig
from m2f.model.config import ModelConfig
from m2f.model.errors import ConfigError
from m2f.model.limits import FROM_0, FROM_1, Section
from m2f.trainer.config import TrainingConfig


@dataclass(frozen=True, kw_only=True)
class ClusterConfig(Section):
    """Number of processes, their resources, and the cluster they run on."""

    address: str | None = None
    """Address of a running Ray cluster. None uses RAY_ADDRESS, or starts a local cluster for the run."""
    num_workers: Annotated[int | tuple[int, int] | Literal["auto"], FROM_1] = "auto"
    """Number of training workers. `auto`: one per available GPU, or one without GPUs. `[min, max]`: as many as fit into
    the cluster, at most `training.global_batch`; the run shrinks if nodes are lost and grows if nodes are added. It
    keeps its global batch, data order and optimizer state."""
    num_cpus_per_worker: Annotated[float, FROM_0] = 1.0
    """CPUs that Ray reserves for each training worker; `training.threads` sets how many it uses."""
    num_gpus_per_worker: Annotated[float | Literal["auto"], FROM_0] = "auto"
    """GPUs that Ray reserves for each training worker; 0 trains on the CPU. `auto`: one if there are GPUs, or at most
    0.75 if evaluation actors must share them. A fraction above 0.5 leaves the rest to evaluation actors."""
    resources_per_worker: Annotated[Mapping[str, float], FROM_0] = field(default_factory=dict)
    """Custom Ray resources of each training worker, for example `{trainer: 1}`. Only nodes with them run workers."""
    max_failures: Annotated[int, FROM_0] = 3
    """Restarts without a new checkpoint before the run stops; every new checkpoint resets the count."""
    shard_tasks: Annotated[int, FROM_1] = 2
    """Number of sharding tasks that run in parallel."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.max_workers < self.min_workers:
            raise ConfigError(
                f"cluster.num_workers is [{self.min_workers}, {self.max_workers}]; put the smaller number first"
            )

    @property
    def min_workers(self) -> int:
        """Minimum number of workers with which a run may start; 1 while `auto` is not resolved."""
        return self._range[0]

    @property
    def max_workers(self) -> int:
        """Maximum number of workers; 1 while `auto` is not resolved."""
        return self._range[1]

    @property
    def _range(self) -> tuple[int, int]:
        workers = 1 if self.num_workers == "auto" else self.num_workers
        return (workers, workers) if isinstance(workers, int) else workers

    @property
    def gpus_per_worker(self) -> float:
        """GPUs of each worker; 0 while `auto` is not resolved."""
        return 0.0 if self.num_gpus_per_worker == "auto" else self.num_gpus_per_worker

    @property
    def needs(self) -> dict[str, float]:
        """Amount per Ray resource of one training worker; resources of amount 0 are left out."""
        amounts = {"CPU": self.num_cpus_per_worker, "GPU": self.gpus_per_worker, **self.resources_per_worker}
        return {name: amount for name, amount in amounts.items() if amount}


@dataclass(frozen=True, kw_only=True)
class TrackingConfig(Section):
    """Where and how MLflow tracks the run."""

    uri: str | None = None
    """URI of the tracking server. None uses MLFLOW_TRACKING_URI, or the sqlite file `mlflow.db` in `output`, which
    must then be a local folder."""
    experiment: str = "m2f"
    """Name of the MLflow experiment of the run; it is created if it does not exist."""
    parent: str | None = None
    """Id or name of the parent run in MLflow, to group the runs of a sweep or of several seeds. A run of that name is
    created if the experiment has none. None: the MLflow run that this process has open in the same store and
    experiment, if any."""


@dataclass(frozen=True, kw_only=True)
class RunConfig(Section):
    """All settings of a run."""

    name: str
    """Name of the run. The run folder is `output/name`."""
    output: str = "runs"
    """Folder or `s3://` prefix that contains the run folder."""
    seed: int = 0
    """Random seed (integer) of the image order, augmentation, random weights and loss points."""
    storage: StorageConfig = field(default_factory=StorageConfig)
    """Access to `s3://` URLs."""
    datasets: Mapping[str, DatasetConfig]
    """Data sets by name; other settings refer to them by these names."""
    data: DataConfig
    """Training data and augmentation."""
    model: ModelConfig = field(default_factory=ModelConfig)
    """Network, losses and post-processing."""
    training: TrainingConfig
    """Steps, batch, optimizer, checkpoints and failure handling."""
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    """Evaluation of checkpoints: sets, metrics and resources."""
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    """Number of workers, their resources, and the Ray cluster they run on."""
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    """Tracking of the run with MLflow."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if problems := [*cross_section_problems(**vars(self)), *url_problems(self, "")]:
            raise ConfigError("\n  ".join(problems))

    def check_metrics(self) -> None:
        """Raise ConfigError if no evaluation set computes a metric that training uses.

        Call this before training only: `m2f eval` may evaluate other sets with the recipe of a run.
        """
        if problems := metric_problems(self.training, self.evaluation):
            raise ConfigError("\n  ".join(problems))

    @property
    def run_folder(self) -> str:
        """Folder or URL that contains all output of the run."""
        return f"{self.output.rstrip('/')}/{self.name}"


def cross_section_problems(
    *,
    name: str | None = None,
    output: str | None = None,
    storage: StorageConfig | None = None,
    datasets: Mapping[str, DatasetConfig] | None = None,
    data: DataConfig | None = None,
    model: ModelConfig | None = None,
    training: TrainingConfig | None = None,
    evaluation: EvaluationConfig | None = None,
    **_: object,
) -> list[str]:
    """Return a message for each conflict between settings of a `RunConfig`, and for an invalid name.

    An argument is None if it is invalid by itself. The checks that need it are then skipped.
    """
    problems = []
    if name is not None and not re.fullmatch(r"\w[\w.-]*", name):
        problems.append(f"name is {name!r}; use letters, digits, '_', '-' and '.', because it is a folder name")
    if datasets is not None:
        problems += _dataset_problems(datasets, data, evaluation)
    if output is not None and storage is not None and datasets is not None and training is not None:
        problems += _timeout_problems(output, storage, datasets, training)
    if model is not None and training is not None and model.freeze and training.precision in ("bf16", "fp16"):
        problems.append(
            f"model.freeze is {list(model.freeze)}, but training.precision {training.precision} would "
            f"also round the frozen weights; set training.precision to {training.precision}_autocast"
        )
    if data is not None and training is not None and training.settled_compile and isinstance(data.augment, ScaleJitter):
        problems.append(
            "training.compile is true, but data.augment makes images of many sizes, and each size is "
            "compiled separately; set data.augment.kind to lsj or shortest_edge, or training.compile to false"
        )
    return problems


def _dataset_problems(
    datasets: Mapping[str, DatasetConfig], data: DataConfig | None, evaluation: EvaluationConfig | None
) -> list[str]:
    problems = [
        f"datasets: the name {dataset!a} {problem}; choose another, because it is a folder name"
        for dataset in datasets
        if (problem := key_problem(dataset)) is not None
    ]
    known = ", ".join(sorted(datasets)) or "none"
    named = [("data.train", mixed.dataset) for mixed in data.train] if data is not None else []
    named += [("evaluation.sets", evaluated.dataset) for evaluated in evaluation.sets] if evaluation is not None else []
    unknown = (
        f"{where}: no data set {name!r} under `datasets` (known: {known})"
        for where, name in named
        if name not in datasets
    )
    return problems + list(dict.fromkeys(unknown))


def _timeout_problems(
    output: str, storage: StorageConfig, datasets: Mapping[str, DatasetConfig], training: TrainingConfig
) -> list[str]:
    """Return a message if the collective timeout is too short for S3.

    One rank may wait for S3 up to `storage.patience_s`, plus the stall timeout, while the others wait for that rank.
    """
    urls = [output, *(dataset.shards for dataset in datasets.values())]
    longest = storage.patience_s + training.stall_timeout_s
    if training.collective_timeout_s > longest or not any("://" in url for url in urls):
        return []
    return [
        f"training.collective_timeout_s is {training.collective_timeout_s:g}, but one rank may wait "
        f"{longest:g} s for S3 (storage.patience_s + training.stall_timeout_s); set it above {longest:g}, or "
        "lower storage.patience_s"
    ]


def url_problems(value: object, path: str) -> list[str]:
    """Return a message for each URL in a setting or section that may contain a secret, because recipes are stored.

    `path` is the dotted path of `value`.
    """
    if isinstance(value, str):
        problem = url_problem(value)
        return [] if problem is None else [f"`{path}`: the URL {problem}, and is stored with the run. {REMEDY}"]
    if is_dataclass(value):
        inner: list[tuple[object, object]] = [(f.name, getattr(value, f.name)) for f in fields(value)]
    elif isinstance(value, Mapping):
        inner = list(value.items())
    else:
        inner = list(enumerate(value)) if isinstance(value, list | tuple) else []
    return [line for name, item in inner for line in url_problems(item, f"{path}.{name}".strip("."))]
