"""Run `m2f VERB`, where the verb prints a result and a warning and returns STATUS: `full_disk_main.py VERB STATUS`.

VERB is `config`, whose result is what it prints, or `train`.
"""

import argparse
import sys

from m2f.cluster.cli import main
from m2f.cluster.terminal import print_err, print_out
from m2f.cluster.verbs import config, train


def run(args: argparse.Namespace) -> int:
    print_out("a result")
    print_err("a warning")
    return int(sys.argv[2])


config.run = train.run = run
sys.exit(main([sys.argv[1], "recipe.yaml"]))
