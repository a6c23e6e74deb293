"""Runs the command line and fails where it imports a package that it shall not: `help_main.py HEAVY,... WORD...`."""

import sys

from m2f.cluster.cli import main

try:
    main(sys.argv[2:])
finally:
    heavy = [name for name in sys.argv[1].split(",") if name in sys.modules]
    assert not heavy, heavy
