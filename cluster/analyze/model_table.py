"""Table of the size and speed of models, both those of the paper and those of recipes."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from m2f.cluster.analyze.class_counts import with_class_count
from m2f.cluster.recipe.config import RunConfig
from m2f.cluster.terminal import print_err
from m2f.eval.results.results import columns
from m2f.model.analysis.flops.executed import build_shapes, count_parameters, executed_flops
from m2f.model.analysis.flops.official import mean_flops, official_flops
from m2f.model.analysis.paper_models import PaperModel
from m2f.model.config import ModelConfig
from m2f.model.mask2former import build_model

TIMED_RUNS = 3
"""Number of timed forward passes; their median is reported. One untimed pass precedes them."""

Size = tuple[int, int]


@dataclass(frozen=True, kw_only=True)
class ModelSize:
    """Size and speed of one model: a row of the table."""

    name: str
    table: str | None
    """Table of the paper that lists the model; None for recipes."""
    parameters: float
    """Parameters in millions."""
    paper_parameters: float | None
    """Parameters in millions, as the paper prints them; None if it prints none."""
    flops: float | None
    """Billions (10^9) of multiply-adds of the official code at the paper's input size; None for recipes."""
    paper_flops: float | None
    """The same count as the paper prints it; None if it prints none."""
    flops_at_size: float
    """Billions of multiply-adds of the official code at the input size of this table.

    The steps after the network, such as the upsampling of masks, are not counted.
    """
    executed: float
    """Billions of multiply-adds that m2f's model executes at the input size of this table."""
    cpu_seconds: float | None
    """CPU time in seconds of a forward pass at the input size of this table; None if it was not measured."""


def paper_sizes(models: Sequence[PaperModel], size: Size, *, timed: bool) -> Iterator[ModelSize]:
    """Measure models of the paper one by one. `size` is the height and width of the input in pixels."""
    for paper in models:
        config = paper.config
        flops = mean_flops(config) if paper.size is None else official_flops(config, paper.size, semantic=True)
        yield _measure(paper.name, config, size, timed, paper=paper, flops=flops.total / 1e9)


def recipe_size(config: RunConfig, size: Size, *, timed: bool) -> ModelSize:
    """Measure a recipe's model. Its number of classes is `model.num_classes`, else that of the training data.

    If the data set is not on this machine, the number may be that of the published data set; a message then reports
    this. Raises ConfigError if the number of classes cannot be determined.
    """
    counted = with_class_count(config)
    if counted.assumption is not None:
        print_err(counted.assumption)
    return _measure(config.name, counted.model, size, timed)


def cpu_seconds_per_image(config: ModelConfig, size: Size) -> float:
    """Return the median CPU time of a forward pass with one image and random weights, summed over all threads.

    Unlike wall time, CPU time hardly depends on other processes of the machine, because these share only the caches.
    """
    model = build_model(config, pretrained_backbone=False).eval()
    images = torch.zeros(1, 3, *size)
    times = []
    with torch.inference_mode():
        for _ in range(1 + TIMED_RUNS):
            started = time.process_time()
            model(images).mask_logits()
            times.append(time.process_time() - started)
    return statistics.median(times[1:])


def format_model_table(rows: Sequence[ModelSize], size: Size, *, markdown: bool) -> str:
    """Format the table with aligned columns for a terminal, or as Markdown."""
    size_text = f"{size[0]}x{size[1]}"
    head = [
        "model",
        "table",
        "M params",
        "paper",
        "GFLOPs",
        "paper",
        f"official {size_text}",
        f"executed {size_text}",
        f"CPU s {size_text}",
    ]
    cells = [
        [
            row.name,
            row.table or "",
            _number(row.parameters, 1),
            _number(row.paper_parameters, 0),
            _number(row.flops, 1),
            _number(row.paper_flops, 0),
            _number(row.flops_at_size, 1),
            _number(row.executed, 1),
            _number(row.cpu_seconds, 2),
        ]
        for row in rows
    ]
    if not markdown:
        return columns(head, cells)
    rule = ["---", "---", *["---:"] * (len(head) - 2)]
    return "\n".join("| " + " | ".join(line) + " |" for line in [head, rule, *cells])


def _measure(
    name: str, config: ModelConfig, size: Size, timed: bool, paper: PaperModel | None = None, flops: float | None = None
) -> ModelSize:
    shapes = build_shapes(config)
    counted = official_flops(config, size)
    return ModelSize(
        name=name,
        table=paper.table if paper else None,
        parameters=count_parameters(shapes) / 1e6,
        paper_parameters=paper.parameters if paper else None,
        flops=flops,
        paper_flops=paper.flops if paper else None,
        flops_at_size=(counted.total - counted.inference) / 1e9,
        executed=executed_flops(shapes, size).total / 1e9,
        cpu_seconds=cpu_seconds_per_image(config, size) if timed else None,
    )


def _number(value: float | None, decimals: int) -> str:
    return "-" if value is None else f"{value:,.{decimals}f}"
