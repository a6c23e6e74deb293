"""Run command lines up to the first import of a missing package: `first_lines_main.py MISSING,... LINE...`."""

import shlex
import sys

sys.modules |= dict.fromkeys(sys.argv[1].split(","))

from m2f.cluster.cli import main  # noqa: E402 - after the packages are removed

for line in sys.argv[2:]:
    sys.stderr.write(f"> {line}\n")
    try:
        main(shlex.split(line))
    except ImportError:
        sys.stderr.write("imports\n")
