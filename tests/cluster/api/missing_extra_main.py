"""Print the status and the last error line of each command line: `missing_extra_main.py HIDDEN,... LINE...`.

Imports of the packages in HIDDEN fail.
"""

import contextlib
import io
import shlex
import sys

sys.modules |= dict.fromkeys(sys.argv[1].split(","))

from m2f.cluster.cli import main  # noqa: E402 - after the packages are hidden

for line in sys.argv[2:]:
    text = io.StringIO()
    with contextlib.redirect_stderr(text):
        status = main(shlex.split(line))
    sys.stdout.write(f"{status} {text.getvalue().splitlines()[-1]}\n")
