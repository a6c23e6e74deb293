"""Fetch a model as from another machine, twice: `fetching_main.py ADDRESS URI`.

Prints the path of its weights, and their content. URI is the tracking store, whose local files count as remote.
"""

import sys

from m2f.cluster.tracking import registered

registered._is_local = lambda location: False
address, uri = sys.argv[1:]
sys.stdout.write(f"{registered.model_folder(address, uri) / 'weights.safetensors'}\n")
sys.stdout.write((registered.model_folder(address, uri) / "weights.safetensors").read_text() + "\n")
