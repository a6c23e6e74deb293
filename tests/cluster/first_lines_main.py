"""Run each command line until it imports a package that is hidden: `first_lines_main.py HIDDEN,... LINE...`."""

import shlex
import sys

sys.modules |= dict.fromkeys(sys.argv[1].split(","))

from m2f.cluster.cli import main  # noqa: E402 - after the packages are hidden

for line in sys.argv[2:]:
    sys.stderr.write(f"> {line}\n")
    try:
        main(shlex.split(line))
    except ImportError:
        sys.stderr.write("imports\n")
