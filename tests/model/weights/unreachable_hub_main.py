"""Fetch a model from the hub of the environment, and print the error."""

import sys

from m2f.model.errors import WeightsError
from m2f.model.weights.hub import hub_folder

try:
    hub_folder("hub:someone/some-model")
except WeightsError as error:
    sys.stdout.write(f"{error}\n")
