"""`m2f plan`: what training will read and how much GPU memory it will need, from the recipe and the manifests."""

from __future__ import annotations

import argparse

from m2f.cluster.exit_status import ExitStatus
from m2f.cluster.terminal import print_out
from m2f.cluster.verbs.arguments import add_recipe, count
from m2f.model.errors import ConfigError

SUMMARY = "predict requests, traffic, cache, memory and largest micro-batch of training on so many ranks"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_recipe(parser)
    parser.add_argument("--world", type=count, metavar="N", help="ranks (default cluster.num_workers)")
    parser.add_argument(
        "--batch",
        type=count,
        metavar="N",
        help="images per rank and step (default: training.global_batch over the ranks)",
    )
    parser.add_argument("--per-machine", type=count, default=8, metavar="N", help="ranks of a machine (default 8)")
    parser.add_argument("--speed", type=float, default=40.0, metavar="X", help="images/s of a rank (default 40)")
    parser.add_argument("--gpu-gb", type=float, default=80.0, metavar="X", help="memory of a GPU (default 80)")


def run(args: argparse.Namespace) -> int:
    from m2f.cluster.recipe.load import load_recipe
    from m2f.cluster.train.compose import compose_job
    from m2f.data_pipeline.order.order import build_order
    from m2f.data_pipeline.order.read_simulation import SimulatedRanks, format_read_costs, simulate_reads
    from m2f.data_pipeline.shards.manifest import Manifest
    from m2f.data_pipeline.storage.storage import Storage
    from m2f.trainer.memory.plan import format_memory, plan_memory

    config = load_recipe(args.recipe, args.overrides)
    world = args.world or config.cluster.max_workers
    batch = args.batch or -(-config.training.global_batch // world)
    for option, value in (("--speed", args.speed), ("--gpu-gb", args.gpu_gb)):
        if not value > 0:
            raise ConfigError(f"{option} is {value}; it must be above 0")
    storage = Storage(config.storage)
    manifests = [Manifest.load(config.datasets[item.dataset].shards, storage) for item in config.data.train]
    order = build_order(manifests, config.seed, config.data)
    ranks = SimulatedRanks(world=world, per_machine=min(args.per_machine, world), batch=batch, images_per_s=args.speed)
    print_out(format_read_costs(simulate_reads(manifests, order, config.data, config.seed, ranks), ranks))
    model = compose_job(config, storage).model
    targets = max(int(manifest.num_segments.max()) for manifest in manifests)
    plan = plan_memory(model, config.data, config.training, world, targets)
    print_out(format_memory(plan, world, config.training.zero.stage, args.gpu_gb))
    return ExitStatus.DONE
