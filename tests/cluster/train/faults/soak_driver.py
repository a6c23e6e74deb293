"""Train on Ray with slow steps: `soak_driver.py RECIPE POLL_S`."""

import sys

import ray

from m2f.cluster.recipe.load import load_recipe
from m2f.cluster.train import ray_launcher, supervisor
from tests.cluster import tiny_run

ray.cloudpickle.register_pickle_by_value(tiny_run)
ray_launcher.train_loop = tiny_run.slow_loop
tiny_run.PAUSE_S = 1.0  # five steps take longer than the longest pause between two kills
supervisor.POLL_S = float(sys.argv[2])
sys.exit(ray_launcher.run_training(load_recipe(sys.argv[1], [])).status != "finished")
