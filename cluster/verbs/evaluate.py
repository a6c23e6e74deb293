"""`m2f eval`: evaluate a checkpoint or other weights on the recipe's evaluation sets."""

from __future__ import annotations

import argparse

from m2f.cluster.exit_status import ExitStatus
from m2f.cluster.terminal import print_err, print_out
from m2f.cluster.verbs.arguments import add_checkpoint, add_overrides
from m2f.model.errors import ConfigError

SUMMARY = "evaluate a checkpoint on the recipe's evaluation sets"
EXAMPLE = "m2f eval runs/cells --checkpoint best"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="RECIPE|FOLDER", help="YAML file of a run, or folder of a run or checkpoint")
    add_overrides(parser)
    add_checkpoint(parser)
    parser.add_argument("--output", metavar="DIR", help="folder for results (default: evaluations/ in the run folder)")
    parser.add_argument(
        "--dump", metavar="DIR", help="folder or URL for predictions by data set, in COCO formats and as label maps"
    )


def run(args: argparse.Namespace) -> int:
    """Evaluate and print the tables. Results of the run's own checkpoints are also logged to its MLflow run."""
    print_err(f"{args.source}: loading PyTorch and MLflow")
    from os.path import abspath

    from m2f.cluster.predict.choose_checkpoint import choose_checkpoint, open_recipe, recipe_of
    from m2f.data_pipeline.storage.scratch import ScratchFolder
    from m2f.data_pipeline.storage.storage import Storage, join

    config, checkpoint_url = open_recipe(args.source, args.overrides)
    if checkpoint_url is not None and args.output is None:
        raise ConfigError(f"{args.source} is a checkpoint without its run; give a folder for the results with --output")
    storage = Storage(config.storage)
    weights = choose_checkpoint(config, storage, args.checkpoint or checkpoint_url)
    config = recipe_of(weights, args.source, args.overrides, config)
    print_out(f"evaluating {weights.url}")
    from m2f.cluster.evaluation.evaluate import results_name, write_files
    from m2f.cluster.evaluation.offline import evaluate_checkpoint
    from m2f.cluster.evaluation.publication import evaluated_checkpoint, make_set_metrics
    from m2f.cluster.tracking.store import TrackingError
    from m2f.cluster.tracking.tracking import Tracking, find_run

    dump = args.dump if args.dump is None or "://" in args.dump else abspath(args.dump)
    evaluations = evaluate_checkpoint(config, weights.url, step=weights.step, dump=dump)
    tracking = None
    try:
        run = find_run(config) if weights.step is not None else None
        tracking = Tracking(run, "offline-evaluation") if run is not None else None
    except TrackingError as error:  # for example, the run is read-only; the results must not be lost
        print_err(f"warning: the results are not logged to MLflow: {error}")
    with ScratchFolder("evaluation") as scratch:
        for evaluation in evaluations:
            run_subfolder = f"evaluations/{weights.name}"
            base = args.output or join(config.run_folder, run_subfolder)
            label, name = evaluation.results.subject.label, results_name(storage, base, evaluation.results)
            artifact_folder, url = f"{run_subfolder}/{name}", join(base, name)
            folder = write_files(storage, url, evaluation.files(), local=scratch / name)
            print_out(f"\n{evaluation.results.table()}\n\nresults: {url}")
            if name != label:
                print_out("stored under a different name: settings, weights or data differ from the stored results")
            if dump is not None:
                print_out(f"predictions: {join(dump, label)}")
            if tracking is not None and weights.step is not None:
                checkpoint = evaluated_checkpoint(config, storage, weights.url, weights.step)
                tracking.log_evaluation(checkpoint, [make_set_metrics(config, storage, evaluation, name)])
                if folder is not None:
                    tracking.log_artifact(folder, artifact_folder)
        if tracking is not None:
            tracking.close()
    return ExitStatus.DONE
