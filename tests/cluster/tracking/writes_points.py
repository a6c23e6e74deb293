"""Log NUMBER points of a run, one per journal entry: `writes_points.py OUTPUT NAME NUMBER`."""

import dataclasses
import sys

from m2f.cluster.recipe.load import parse_recipe
from m2f.cluster.tracking.tracking import Tracking, create_run

RECIPE = """
name: tracked
datasets: {train: {shards: shards/train}}
data: {train: [{dataset: train}]}
training: {max_steps: 10}
"""
output, name, number = sys.argv[1:]
run = create_run(dataclasses.replace(parse_recipe(RECIPE), output=output, name=name))
tracking = Tracking(run, "driver", interval_s=0.01)
for step in range(int(number)):
    tracking.log_metrics(step, {"train/loss/total": float(step)})
sys.exit(0 if tracking.finish("FINISHED", 200.0) else 1)
