"""Build the model of a rank: with the weights that the recipe names, or untrained, to load a checkpoint into it."""

from __future__ import annotations

import torch

from m2f.data_pipeline.storage.storage import Storage
from m2f.model.config import ModelConfig
from m2f.model.mask2former import build_model
from m2f.model.segmenter import Segmenter
from m2f.model.weights.build import build_with_weights
from m2f.model.weights.load import LoadReport
from m2f.trainer.checkpoint.identity import StartWeights
from m2f.trainer.checkpoint.weights import (
    backbone_start,
    check_start_weights,
    fetched_backbone,
    fetched_weights,
    known_class_rows,
    read_identity,
    resolve_start_weights,
    start_weights,
)
from m2f.trainer.job import TrainJob
from m2f.trainer.reporting import Notice, Reporter


def build_empty_model(job: TrainJob) -> Segmenter:
    """Build the model without pretrained weights, because a checkpoint provides all of them."""
    torch.manual_seed(job.seed)
    return build_model(job.model, pretrained_backbone=False)


def start_model(
    job: TrainJob, storage: Storage, reporter: Reporter | None
) -> tuple[Segmenter, tuple[StartWeights, ...]]:
    """Build the model with the weights that the recipe starts from.

    Returns the model and the start weights with their digests. Only a rank with a `reporter` computes the digests and
    reports them; on all others the second value is empty.
    """
    torch.manual_seed(job.seed)  # equal on all ranks, each of which keeps only its part under ZeRO-3
    with fetched_backbone(job.model, storage) as config:
        return _start_model(job, config, storage, reporter)


def _start_model(
    job: TrainJob, config: ModelConfig, storage: Storage, reporter: Reporter | None
) -> tuple[Segmenter, tuple[StartWeights, ...]]:
    """Start the model of a job. `config` are its settings with the weights of the backbone at a local path."""
    source, backbone_source = job.model.weights, job.model.backbone.weights
    if source is None:
        model = build_model(config)
        start = backbone_start(backbone_source, config.backbone) if reporter is not None else ()
        _report_start(reporter, start)
        return model, start
    check_start_weights(job.identity, job.model, storage)
    file = resolve_start_weights(source, storage)
    rows = known_class_rows(job.identity, file, storage)
    with fetched_weights(file, storage) as path:
        # Weights that m2f exported have an identity. They are complete, even if their training started from deltas.
        deltas = job.model.weights_are_deltas and read_identity(str(path), storage) is None
        model, report = build_with_weights(config, path, rows, deltas=deltas)
        start: tuple[StartWeights, ...] = ()
        if reporter is not None:
            start = (
                start_weights("model.weights", source, path),
                *(backbone_start(backbone_source, config.backbone) if report.head_alone else ()),
            )
    _report_start(reporter, start, report)
    return model, start


def _report_start(reporter: Reporter | None, start: tuple[StartWeights, ...], report: LoadReport | None = None) -> None:
    if reporter is None:
        return
    for weights in start:
        loaded = "" if report is None or weights.setting != "model.weights" else f": {report}"
        reporter.report(Notice("weights", 0, f"{weights.source} (sha256 {weights.sha256}){loaded}"))
