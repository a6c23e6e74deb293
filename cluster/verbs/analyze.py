"""`m2f analyze`: size and speed of models, quality by decoder layer, and distribution of attention."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from m2f.cluster.exit_status import ExitStatus
from m2f.cluster.terminal import Progress, print_err, print_out
from m2f.cluster.verbs.arguments import OVERRIDE, add_checkpoint, choose_datasets, count, split_overrides
from m2f.model.errors import ConfigError

if TYPE_CHECKING:
    from m2f.cluster.analyze.analyze import AnalysisSubject

SUMMARY = "analyze models: size and speed, quality by decoder layer, distribution of attention"
EXAMPLE = "m2f analyze layers cells.yaml val --images 50"
ANALYSES = {
    "table": "parameters and multiply-adds of the models of recipes; without a recipe, of all models of the paper",
    "layers": "metrics of the predictions of each decoder layer, and recall of their masks as proposals",
    "attention": "share of attention on objects by layer and level, with pictures",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("what", choices=ANALYSES, help="; ".join(f"{name}: {text}" for name, text in ANALYSES.items()))
    parser.add_argument(
        "words",
        nargs="*",
        metavar="RECIPE",
        help="table: recipes; otherwise one recipe and a data set (default: the first evaluation set); "
        f"{OVERRIDE} overrides a setting",
    )
    add_checkpoint(parser)
    parser.add_argument(
        "--images", type=count, default=100, metavar="N", help="number of images, evenly spaced (default: 100)"
    )
    parser.add_argument(
        "--pictures", type=int, default=8, metavar="N", help="attention: number of pictures (default: 8)"
    )
    parser.add_argument("--output", metavar="DIR", help="folder for JSON results and pictures (default: none)")
    parser.add_argument(
        "--size", default="512x512", metavar="HxW", help="table: input size in pixels (default: 512x512)"
    )
    parser.add_argument("--seconds", action="store_true", help="table: also measure CPU seconds per forward pass")
    parser.add_argument("--markdown", action="store_true", help="table: print Markdown")


def run(args: argparse.Namespace) -> int:
    print_err(f"analyze {args.what}: loading PyTorch")
    match args.what:
        case "table":
            return _table(args)
        case "layers":
            return _layers(args)
        case _:
            return _attention(args)


def _table(args: argparse.Namespace) -> int:
    from m2f.cluster.analyze.model_table import format_model_table, paper_sizes, recipe_size
    from m2f.cluster.recipe.load import load_recipe
    from m2f.model.analysis.paper_models import paper_models

    size = _parse_size(args.size)
    recipes, overrides = split_overrides(args.words)
    if overrides and not recipes:
        raise ConfigError(f"{overrides[0]} overrides a setting of a recipe, but no recipe is given")
    rows = [recipe_size(load_recipe(recipe, overrides), size, timed=args.seconds) for recipe in recipes]
    if not recipes:
        models = paper_models()
        with Progress("measuring", len(models), "models") as progress:
            for row in paper_sizes(models, size, timed=args.seconds):
                rows.append(row)
                progress.advance(1)
    print_out(format_model_table(rows, size, markdown=args.markdown))
    return ExitStatus.DONE


def _layers(args: argparse.Namespace) -> int:
    import json
    from dataclasses import asdict

    from m2f.cluster.analyze.analyze import analyze_layers
    from m2f.eval.inference.layers import layer_table

    subject = _open_subject(args)
    layers = analyze_layers(subject)
    print_out(f"{subject.title}\n\n{layer_table(layers)}")
    _write(args.output, {"layers.json": json.dumps([asdict(layer) for layer in layers], indent=1).encode()})
    return ExitStatus.DONE


def _attention(args: argparse.Namespace) -> int:
    import json

    from m2f.cluster.analyze.analyze import analyze_attention

    if args.pictures < 0:
        raise ConfigError(f"--pictures is {args.pictures}; it must be at least 0")
    subject = _open_subject(args)
    mass, pictures = analyze_attention(subject, args.pictures if args.output else 0)
    print_out(f"{subject.title}\n\n{mass.table()}")
    shares = {"object_share_by_layer": mass.by_layer, "object_share_by_level": mass.by_level}
    files = {"attention.json": json.dumps(shares, indent=1).encode()}
    _write(args.output, files | {f"attention_{image_id}.png": png for image_id, png in pictures.items()})
    return ExitStatus.DONE


def _open_subject(args: argparse.Namespace) -> AnalysisSubject:
    from m2f.cluster.analyze.analyze import open_subject
    from m2f.cluster.predict.choose_checkpoint import choose_checkpoint
    from m2f.cluster.recipe.load import load_recipe
    from m2f.data_pipeline.storage.storage import Storage

    words, overrides = split_overrides(args.words)
    recipe, names = words[:1], words[1:]
    if not recipe or len(names) > 1:
        raise ConfigError(f"analyze {args.what} takes one recipe and at most one data set, not {words}")
    config = load_recipe(recipe[0], overrides)
    evaluated = [s.dataset for s in config.evaluation.sets] or [config.data.train[0].dataset]
    dataset = choose_datasets(names, list(config.datasets))[0] if names else evaluated[0]
    storage = Storage(config.storage)
    return open_subject(config, choose_checkpoint(config, storage, args.checkpoint), dataset, args.images, storage)


def _parse_size(text: str) -> tuple[int, int]:
    """Parse `HxW` as height and width in pixels. Raises ConfigError unless both are integers of at least 32."""
    height, _, width = text.partition("x")
    if not (height.isdecimal() and width.isdecimal() and min(int(height), int(width)) >= 32):
        raise ConfigError(f"--size is {text!r}; give height and width in pixels, at least 32 each, for example 512x512")
    return int(height), int(width)


def _write(folder: str | None, files: dict[str, bytes]) -> None:
    from pathlib import Path

    if folder is None:
        return
    Path(folder).mkdir(parents=True, exist_ok=True)
    for name, data in files.items():
        (Path(folder) / name).write_bytes(data)
    print_out(f"\n{folder}: {', '.join(files)}")
