"""Write a short, commented recipe for a folder of own data."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, fields, replace
from pathlib import Path

from m2f.cluster.own_data.choices import Choices
from m2f.cluster.own_data.division import Use, divide
from m2f.cluster.own_data.map_pairs import NO_CATEGORY_FILE
from m2f.cluster.own_data.sets import DataFormat, choose_sets
from m2f.data_pipeline.categories import Task
from m2f.data_pipeline.config import DatasetConfig
from m2f.data_pipeline.source_parts import PartConfig, TileConfig
from m2f.data_pipeline.sources import LabelMapSource, SourceConfig
from m2f.model.config import ModelConfig, PostprocessConfig

_TASK_BY_FORMAT: Mapping[str, Task] = {
    "coco_panoptic": "panoptic",
    "huggingface": "panoptic",
    "label_maps": "semantic",
    "color_maps": "semantic",
    "coco_stuff": "semantic",
}


@dataclass(frozen=True, kw_only=True)
class InitOptions:
    """Options of `m2f init`."""

    name: str
    output: Path
    task: Task | None = None
    group: str | None = None
    val_share: float = 0.2
    tiles: bool = False
    weights: str | None = None
    background: str = "background"
    """Name of the class that `adds_background` adds."""
    published: ModelConfig | None = None
    """Model configuration of `weights` if they are a model of the hub or a Hugging Face folder; else None."""


def choose_task(data_format: DataFormat, options: InitOptions) -> Task:
    """Return the requested task, else the usual task of the format."""
    return options.task or _TASK_BY_FORMAT.get(data_format.kind, "instance")


def adds_background(data_format: DataFormat, options: InitOptions) -> bool:
    """Return whether the data sets get a class for pixels without an object, because the format has only objects."""
    return choose_task(data_format, options) != "instance" and data_format.kind not in (*_TASK_BY_FORMAT, "voc")


def build_datasets(data_format: DataFormat, options: InitOptions) -> dict[str, DatasetConfig]:
    """Return the data sets of `choose_sets` for training and validation by name.

    Data without a validation set are divided as in `divide`, which opens the sources if there are several.
    """
    background = options.background if adds_background(data_format, options) else None
    tiles = TileConfig() if options.tiles else None
    chosen = choose_sets(data_format)
    train, val = ([_with_category_file(found.source, options) for found in s] for s in (chosen.train, chosen.val))
    uses: Sequence[Use] = ["train"] * len(train)
    if not val:
        uses = divide(train, choose_task(data_format, options), options.val_share, options.group)
    entries = [("train", source, use) for source, use in zip(train, uses, strict=True) if use != "val"]
    entries += [("val", source, use) for source, use in zip(train, uses, strict=True) if use != "train"]
    entries += [("val", source, "val") for source in val]
    datasets: dict[str, DatasetConfig] = {}
    for split, source, use in entries:
        count = sum(name.startswith(split) for name in datasets)
        name = f"{split}{count + 1}" if count else split
        part = None
        if use == "both":
            part = PartConfig(
                take="train" if split == "train" else "val", val_share=options.val_share, group=options.group
            )
        datasets[name] = DatasetConfig(
            shards=f"data/{options.name}/{name}",
            source=source,
            part=part,
            background=background,
            tiles=tiles,
        )
    return datasets


def category_file_path(options: InitOptions) -> Path:
    """Return the path of the file with class names that is written for label maps without such a file."""
    return options.output.with_suffix(".classes.json")


def category_text(classes: Mapping[int, str | None]) -> str:
    """Return a JSON list of classes. Classes without a name get a placeholder that the user can change.

    If the values are 0 and 1, or 0 and 255, the placeholders are background and foreground.
    """
    pair = ("background", "foreground") if set(classes) in ({0, 1}, {0, 255}) else None
    rows = [
        {"label": value, "name": name or (pair[i] if pair else f"class {value}"), "isthing": 0}
        for i, (value, name) in enumerate(classes.items())
    ]
    return "[" + ",\n ".join(json.dumps(row) for row in rows) + "]\n"


def recipe_text(
    data_format: DataFormat,
    options: InitOptions,
    choices: Choices,
    datasets: Mapping[str, DatasetConfig],
    num_samples: Mapping[str, int],
) -> str:
    """Return the recipe as YAML text.

    Args:
        data_format: format of the data.
        options: options of `m2f init`.
        choices: settings that depend on the data.
        datasets: data sets by name.
        num_samples: number of samples of each training set. The first set defines the classes.
    """
    task = choose_task(data_format, options)
    is_weighted = len(set(num_samples.values())) > 1  # otherwise, images of small sets would be used more often
    weights = {name: f", weight: {count}" if is_weighted else "" for name, count in num_samples.items()}
    train = ", ".join(f"{{dataset: {name}{weight}}}" for name, weight in weights.items())
    val = ", ".join(f"{{dataset: {name}}}" for name in datasets if name.startswith("val"))
    side = choices.crop.value
    output = shlex.quote(str(options.output))
    lines = [
        f"# m2f shard {output} && m2f train {output}",
        f"# {data_format.kind}: {data_format.evidence}",
        f"name: {_value(options.name)}",  # quoted, because YAML reads 2024 and true as other types
        "datasets:",
    ]
    for name, dataset in datasets.items():
        lines.append(f"  {name}: {_flow_style(dataset)}")
    lines += [
        "data:",
        f"  task: {task}",
        f"  train: [{train}]",
        f"  # {choices.crop.reason}",
        f"  augment: {{kind: lsj, size: {side}, min_scale: 0.5, max_scale: 2.0}}",
        "model:",
    ]
    if options.weights is None:
        lines += [
            "  # Published backbone weights, if the hub is reachable. Weights of a whole model converge faster, as in",
            "  # configs/finetune: m2f init --weights hub:facebook/mask2former-swin-tiny-coco-instance, or a FILE",
            "  backbone: {kind: timm, name: resnet50, pretrained: auto}",
        ]
    else:
        lines += [
            "  # Classes are matched by name; other classes are newly initialised.",
            f"  weights: {_value(options.weights)}",
        ]
    if options.published is not None:
        parts = {name: getattr(options.published, name) for name in ("backbone", "pixel_decoder")}
        lines += [
            f"  {name}: {_flow_style(part)}" for name, part in parts.items() if part != getattr(ModelConfig(), name)
        ]
    lines += [
        f"  transformer_decoder: {_decoder(options.published, choices.queries.value)}  # {choices.queries.reason}",
        *_postprocess(task, choices.queries.value),
        f"  loss: {{num_points: {choices.points.value}}}  # {choices.points.reason}",
        "training:",
        f"  max_steps: {choices.steps.value}  # {choices.steps.reason}",
        f"  global_batch: {choices.global_batch}",
        f"  micro_batch: {choices.micro_batch.value}  # {choices.micro_batch.reason}",
        "  precision: auto",
        "  # The backbone is pretrained, so its learning rate is a tenth of the others.",
        "  optimizer: {lr: 1.0e-4, backbone_lr_multiplier: 0.1}",
        f"  checkpoint: {{every_steps: {max(1, choices.steps.value // 5)}, keep: 2}}",
        "evaluation:",
        f"  sets: [{val}]",
        f"  tasks: [{task}]",
        f"  shortest_edge: {side}",
        f"  max_size: {2 * side}",
        "cluster: {num_workers: auto, num_gpus_per_worker: auto}",
    ]
    return "\n".join(lines) + "\n"


def _decoder(published: ModelConfig | None, queries: int) -> str:
    """Return the decoder settings.

    For published weights, these are the settings of the weights, with at least as many queries. A smaller or changed
    decoder could not use all of the weights.
    """
    default = ModelConfig().transformer_decoder
    decoder = default if published is None else published.transformer_decoder
    if published is None or decoder.kind != default.kind:
        return f"{{num_queries: {queries}}}"
    with_default_queries = replace(decoder, num_queries=default.num_queries)
    return f"{_flow_style(with_default_queries)[:-1]}, num_queries: {max(queries, decoder.num_queries)}}}"


def _postprocess(task: Task, queries: int) -> list[str]:
    """Return the setting that keeps one object per query in predictions, if the default keeps fewer."""
    if task == "semantic" or queries <= PostprocessConfig.max_instances:
        return []
    return [f"  postprocess: {{max_instances: {queries}}}  # AP counts 100 detections per class and image"]


def _with_category_file(source: SourceConfig, options: InitOptions) -> SourceConfig:
    if isinstance(source, LabelMapSource) and source.categories == NO_CATEGORY_FILE:
        return replace(source, categories=str(category_file_path(options)))
    return source


def _value(value: object) -> str:
    """Return a value as JSON without escaped letters, because YAML does not support JSON's surrogate pairs."""
    return json.dumps(value, ensure_ascii=False)


def _flow_style(section: object) -> str:
    """Return a section in YAML's flow style without default values."""
    items = []
    for entry in fields(section):  # pyrefly: ignore[bad-argument-type]
        value = getattr(section, entry.name)
        default = entry.default if entry.default is not MISSING else None
        if value == default and entry.name != "kind":
            continue
        text = _flow_style(value) if hasattr(value, "__dataclass_fields__") else _value(value)
        items.append(f"{entry.name}: {value if entry.name in ('kind', 'take') else text}")
    return "{" + ", ".join(items) + "}"
