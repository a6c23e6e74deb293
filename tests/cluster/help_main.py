"""Run a command line, and fail if it imports a heavy package: `help_main.py HEAVY,... WORD...`."""

import sys

from m2f.cluster.cli import main

try:
    main(sys.argv[2:])
finally:
    heavy = [name for name in sys.argv[1].split(",") if name in sys.modules]
    assert not heavy, heavy
