"""Import modules while packages are missing: `import_without.py MISSING,... MODULE...`."""

import importlib
import sys

sys.modules |= dict.fromkeys(sys.argv[1].split(","))
for module in sys.argv[2:]:
    importlib.import_module(module)
