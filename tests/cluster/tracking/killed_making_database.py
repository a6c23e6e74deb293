"""Create the MLflow run of a recipe: `killed_making_database.py OUTPUT [NAME [dies]]`.

With `dies`, this process kills itself in the middle of the database upgrade.
"""

import dataclasses
import os
import signal
import sys

from m2f.cluster.recipe.load import parse_recipe
from m2f.cluster.tracking import database
from m2f.cluster.tracking.tracking import create_run

RECIPE = """
name: tracked
datasets: {train: {shards: shards/train}}
data: {train: [{dataset: train}]}
training: {max_steps: 10}
"""


def write_and_die(partial, uri):
    with open(partial, "ab") as file:
        file.write(b"half an upgrade")
    os.kill(os.getpid(), signal.SIGKILL)


output, name = [*sys.argv[1:], "tracked"][:2]
if sys.argv[3:] == ["dies"]:
    database._upgrade = write_and_die
create_run(dataclasses.replace(parse_recipe(RECIPE), output=output, name=name))
