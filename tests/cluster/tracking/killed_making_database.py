"""Creates the MLflow run of a recipe, and may be killed meanwhile: `killed_making_database.py OUTPUT [NAME]`."""

import dataclasses
import sys

from m2f.cluster.recipe.load import parse_recipe
from m2f.cluster.tracking.tracking import create_run

RECIPE = """
name: tracked
datasets: {train: {shards: shards/train}}
data: {train: [{dataset: train}]}
training: {max_steps: 10}
"""
output, name = [*sys.argv[1:], "tracked"][:2]
create_run(dataclasses.replace(parse_recipe(RECIPE), output=output, name=name))
