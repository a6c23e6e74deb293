"""Run a driver command with restarts: `restarting_parent.py RECIPE COMMAND...`."""

import sys

from m2f.cluster.recipe.load import load_recipe
from m2f.cluster.train.driver_restarts import run_with_restarts

sys.exit(run_with_restarts(sys.argv[2:], load_recipe(sys.argv[1])))
