import subprocess
import sys

import pytest

from tests.waiting import PATIENCE_S

LIGHT = ("ray", "mlflow", "torch")
MODULES = {
    "m2f.cluster.recipe.config": LIGHT,
    "m2f.cluster.recipe.load": LIGHT,
    "m2f.cluster.train.driver_restarts": LIGHT,
    "m2f.cluster.train.failure_policy": LIGHT,
    "m2f.cluster.train.local_rank": LIGHT,
    "m2f.cluster.train.processes": LIGHT,
    "m2f.cluster.train.local": ("ray",),
}


@pytest.mark.parametrize("module", MODULES)
def test_local_launcher_modules_load_no_heavy_package(module):
    code = f"import {module}, sys; print(sorted(set({MODULES[module]}) & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=PATIENCE_S)
    assert done.stdout.strip() == "[]"
