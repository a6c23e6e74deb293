"""RunConfig, the whole recipe. Imports neither ray nor mlflow nor torch, so that the command line starts at once."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Annotated, Literal

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
    """How many processes do the work, and where."""

    address: str | None = None
    """Address of a running Ray cluster; None starts a local one for the run."""
    num_workers: Annotated[int | tuple[int, int] | Literal["auto"], FROM_1] = "auto"
    """Training workers. `auto`: one per GPU that is there, else one. `[min, max]`: as many as the cluster has room for;
    the run shrinks when nodes are lost and grows when they come back, with the global batch, the data order and the
    optimizer state kept."""
    num_cpus_per_worker: Annotated[float, FROM_0] = 1.0
    """CPUs that Ray reserves for each training worker; `training.threads` says how many it uses."""
    num_gpus_per_worker: Annotated[float | Literal["auto"], FROM_0] = "auto"
    """GPUs that Ray reserves for each training worker; 0 trains on the CPU. `auto`: one if there are GPUs, of which
    evaluation actors get a quarter where none is left for them. A fraction above 0.5 leaves room for such an actor."""
    resources_per_worker: Annotated[Mapping[str, float], FROM_0] = field(default_factory=dict)
    """Custom Ray resources that each takes, for example `{trainer: 1}`: it runs only on nodes that offer them."""
    max_failures: Annotated[int, FROM_0] = 3
    """Restarts without progress before the run stops; every new checkpoint resets the count."""
    shard_tasks: Annotated[int, FROM_1] = 2
    """Sharding tasks that run at once."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.max_workers < self.min_workers:
            raise ConfigError(
                f"cluster.num_workers is [{self.min_workers}, {self.max_workers}]; give the smaller first"
            )

    @property
    def min_workers(self) -> int:
        """The run starts as soon as the cluster has resources for so many; 1 while `auto` is not decided on."""
        return self._range[0]

    @property
    def max_workers(self) -> int:
        """The run never uses more; 1 while `auto` is not decided on."""
        return self._range[1]

    @property
    def _range(self) -> tuple[int, int]:
        workers = 1 if self.num_workers == "auto" else self.num_workers
        return (workers, workers) if isinstance(workers, int) else workers

    @property
    def gpus_per_worker(self) -> float:
        """GPUs of each worker; 0 while `auto` is not decided on."""
        return 0.0 if self.num_gpus_per_worker == "auto" else self.num_gpus_per_worker

    @property
    def needs(self) -> dict[str, float]:
        """Ray resources of one training worker."""
        amounts = {"CPU": self.num_cpus_per_worker, "GPU": self.gpus_per_worker, **self.resources_per_worker}
        return {name: amount for name, amount in amounts.items() if amount}


@dataclass(frozen=True, kw_only=True)
class TrackingConfig(Section):
    """MLflow."""

    uri: str | None = None
    """Tracking server; None takes MLFLOW_TRACKING_URI, else the sqlite file `mlflow.db` in a local `output`."""
    experiment: str = "m2f"
    """Name of the MLflow experiment that gets the run; it is made where it does not exist."""
    parent: str | None = None
    """MLflow run below which the run is shown, for the runs of a sweep or of several seeds: its id, or a name, under
    which one is made where the experiment has none."""


@dataclass(frozen=True, kw_only=True)
class RunConfig(Section):
    """One run: all settings of a recipe."""

    name: str
    """Name of the run; with `output` it gives the run folder."""
    output: str = "runs"
    """Folder or `s3://` prefix under which the run folder is made."""
    seed: int = 0
    """Whole number from which the order of images, augmentation, random weights and loss points follow."""
    storage: StorageConfig = field(default_factory=StorageConfig)
    """How `s3://` URLs are reached."""
    datasets: Mapping[str, DatasetConfig]
    """Data sets by name; other settings refer to them by these names."""
    data: DataConfig
    """What training reads, and how images are augmented."""
    model: ModelConfig = field(default_factory=ModelConfig)
    """Network, losses and post-processing."""
    training: TrainingConfig
    """Steps, batch, optimizer, checkpoints and what happens after failures."""
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    """What is computed for every checkpoint, on which sets and with what resources."""
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    """Number of workers, their resources and the Ray cluster they run on."""
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    """Where MLflow keeps the run."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not re.fullmatch(r"\w[\w.-]*", self.name):
            raise ConfigError(f"name is {self.name!r}; use letters, digits, '_', '-' and '.', as it names a folder")
        for dataset in self.datasets:
            if (problem := key_problem(dataset)) is not None:
                raise ConfigError(f"datasets: the name {dataset!a} {problem}; choose another, as it names a folder")
        known = ", ".join(sorted(self.datasets)) or "none"
        named = [("data.train", m.dataset) for m in self.data.train]
        named += [("evaluation.sets", s.dataset) for s in self.evaluation.sets]
        for where, dataset in named:
            if dataset not in self.datasets:
                raise ConfigError(f"{where}: no data set {dataset!r} under `datasets` (known: {known})")
        if unfit := url_problems(self, ""):
            raise ConfigError("\n  ".join(unfit))
        self._check_timeouts()
        self._check_early_stopping()
        if self.model.freeze and self.training.precision in ("bf16", "fp16"):
            raise ConfigError(
                f"model.freeze is {list(self.model.freeze)} and training.precision {self.training.precision}, which "
                f"would round the frozen weights, too; set training.precision to {self.training.precision}_autocast"
            )
        if self.training.compile and isinstance(self.data.augment, ScaleJitter):
            raise ConfigError(
                "training.compile is true, but data.augment makes images of many sizes, each compiled anew; "
                "set data.augment.kind to lsj or shortest_edge, or training.compile to false"
            )

    def _check_early_stopping(self) -> None:
        stopping = self.training.early_stopping
        labels = [evaluated.label for evaluated in self.evaluation.sets]
        if stopping is None or stopping.metric.rpartition("/")[0] in labels:
            return
        known = f"; it begins with one of {', '.join(f'{label}/' for label in labels)}" if labels else ""
        raise ConfigError(
            f"training.early_stopping.metric is {stopping.metric!r}, but evaluation.sets has no such set"
            f"{known or ', as it is empty'}"
        )

    def _check_timeouts(self) -> None:
        """One rank may wait for an S3 store as long as patience allows, while the others wait for it."""
        urls = [self.output, *(dataset.shards for dataset in self.datasets.values())]
        longest = self.storage.patience_s + self.training.stall_timeout_s
        if any("://" in url for url in urls) and self.training.collective_timeout_s <= longest:
            raise ConfigError(
                f"training.collective_timeout_s is {self.training.collective_timeout_s:g}, but one rank may wait "
                f"{longest:g} s for S3 (storage.patience_s + training.stall_timeout_s); set it above {longest:g}, or "
                "lower storage.patience_s"
            )

    @property
    def run_folder(self) -> str:
        """Folder or URL that holds everything the run writes."""
        return f"{self.output.rstrip('/')}/{self.name}"


def url_problems(value: object, path: str) -> list[str]:
    """A line for each URL in a setting or section that must not be stored with the run; `path` is its dotted path."""
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
