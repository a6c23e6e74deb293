"""Import a module of m2f from a wheel, and print its file: `import_wheel_main.py WHEEL`."""

import sys

sys.path.insert(0, sys.argv[1])

import m2f.data_pipeline.categories

sys.stdout.write(f"{m2f.data_pipeline.categories.__file__}\n")
