"""Check an installation of m2f from a folder with files named like our packages: packaged.py HOME ARCHIVES

All modules of m2f must come from HOME, the folder that contains `m2f`. The upload for a cluster is packed in ARCHIVES.
"""

import importlib
import sys
from pathlib import Path

sys.path.insert(0, str(Path.cwd()))  # as `python -m` does
home, archives = map(Path, sys.argv[1:])

from m2f.cluster import demo  # noqa: E402
from m2f.cluster.submit.upload import pack  # noqa: E402

for name in ("eval.inference.evaluator", "model.mask2former", "trainer.loop", "cluster.verbs.train"):
    importlib.import_module(f"m2f.{name}")
paths = {name: Path(module.__file__ or "") for name, module in sys.modules.items() if name.partition(".")[0] == "m2f"}
misplaced = {name: path for name, path in paths.items() if not path.is_relative_to(home)}
assert not misplaced, misplaced
assert not {"model", "eval", "trainer"} & set(sys.modules)
assert demo.RECIPE.is_relative_to(home), demo.RECIPE
archives.mkdir()
pack(archives, recipe=None)
sys.stdout.write(demo.demo_config("out").name)
