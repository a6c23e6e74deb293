"""`m2f plan`: predict the data traffic and GPU memory of training from the recipe and the manifests."""

from __future__ import annotations

import argparse
from dataclasses import replace
from typing import TYPE_CHECKING

from m2f.cluster.exit_status import ExitStatus
from m2f.cluster.terminal import print_err, print_out
from m2f.cluster.verbs.arguments import add_recipe, count
from m2f.model.errors import ConfigError

if TYPE_CHECKING:
    from m2f.cluster.recipe.config import RunConfig

SUMMARY = "predict requests, traffic, cache, memory and maximum micro-batch of training on N ranks"
EXAMPLE = "m2f plan coco_panoptic_r50 --world 8 --gpu-gb 40"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_recipe(parser)
    parser.add_argument(
        "--world", type=count, metavar="N", help="number of ranks (default: maximum of cluster.num_workers; 1 for auto)"
    )
    parser.add_argument(
        "--batch",
        type=count,
        metavar="N",
        help="images per rank and step (default: training.global_batch divided by the ranks)",
    )
    parser.add_argument("--per-machine", type=count, default=8, metavar="N", help="ranks per machine (default: 8)")
    parser.add_argument("--speed", type=float, default=40.0, metavar="X", help="images/s per rank (default: 40)")
    parser.add_argument("--gpu-gb", type=float, default=80.0, metavar="X", help="memory per GPU in GB (default: 80)")


def run(args: argparse.Namespace) -> int:
    from m2f.cluster.recipe.load import load_recipe

    config = load_recipe(args.recipe, args.overrides)
    print_err(f"{args.recipe}: loading PyTorch")
    from m2f.cluster.analyze.class_counts import with_class_count
    from m2f.trainer.memory.plan import format_memory, plan_memory

    world = args.world or config.cluster.max_workers
    batch = args.batch or -(-config.training.global_batch // world)
    for option, value in (("--speed", args.speed), ("--gpu-gb", args.gpu_gb)):
        if not value > 0:
            raise ConfigError(f"{option} is {value}; it must be above 0")
    segments = _print_reads(config, world, batch, args)
    if segments is None:
        segments = config.model.transformer_decoder.num_queries
        print_err(
            f"no shards yet: assuming {segments} segments per image (one per query); to predict reads, run `m2f shard`"
        )
    found = with_class_count(config)
    if found.assumption is not None:
        print_err(found.assumption)
    training = config.training
    if training.precision == "auto":
        training = replace(training, precision="bf16_autocast")
        print_err("training.precision is auto; assuming bf16_autocast")
    plan = plan_memory(found.model, config.data, training, world, segments)
    print_out(format_memory(plan, world, training.zero.stage, args.gpu_gb))
    return ExitStatus.DONE


def _print_reads(config: RunConfig, world: int, batch: int, args: argparse.Namespace) -> int | None:
    """Print the predicted reads of training, and return the maximum number of segments per image.

    Returns None if there are no shards yet.
    """
    from m2f.data_pipeline.order.order import build_order
    from m2f.data_pipeline.order.read_simulation import SimulatedRanks, format_read_costs, simulate_reads
    from m2f.data_pipeline.shards.manifest import DATASET_FILE, Manifest
    from m2f.data_pipeline.storage.storage import Storage, join

    storage = Storage(config.storage)
    shards = [config.datasets[item.dataset].shards for item in config.data.train]
    if not any(storage.exists(join(folder, DATASET_FILE)) for folder in shards):
        return None
    manifests = [Manifest.load(folder, storage) for folder in shards]
    order = build_order(manifests, config.seed, config.data)
    ranks = SimulatedRanks(world=world, per_machine=min(args.per_machine, world), batch=batch, images_per_s=args.speed)
    print_out(format_read_costs(simulate_reads(manifests, order, config.data, config.seed, ranks), ranks))
    return max(int(manifest.num_segments.max()) for manifest in manifests)
