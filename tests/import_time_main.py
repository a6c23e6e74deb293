"""Print if `import m2f` took under 0.5 CPU seconds, and what it imported: `import_time_main.py PACKAGE,...`."""

import sys
import time

before_s = time.process_time()
import m2f  # noqa: E402 - the import is what is measured

elapsed_s = time.process_time() - before_s
heavy = sorted(set(sys.argv[1].split(",")) & set(sys.modules))
sys.stdout.write(f"{elapsed_s < 0.5} {heavy} {m2f.load.__name__}\n")
