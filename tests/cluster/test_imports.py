import subprocess
import sys

import pytest

from tests.waiting import PATIENCE_S

HEAVY_PACKAGES = ("ray", "mlflow", "torch")
MODULES = {
    "m2f.cluster.own_data.init": HEAVY_PACKAGES,
    "m2f.cluster.recipe.config": HEAVY_PACKAGES,
    "m2f.cluster.recipe.load": HEAVY_PACKAGES,
    "m2f.cluster.train.driver_restarts": HEAVY_PACKAGES,
    "m2f.cluster.train.failure_policy": HEAVY_PACKAGES,
    "m2f.cluster.train.local_rank": HEAVY_PACKAGES,
    "m2f.cluster.train.processes": HEAVY_PACKAGES,
    "m2f.cluster.train.local": ("ray",),
}


@pytest.mark.parametrize("module", MODULES)
def test_modules_that_need_no_heavy_package_load_none(module):
    code = f"import {module}, sys; print(sorted(set({MODULES[module]}) & set(sys.modules)))"
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, capture_output=True, text=True, check=True, timeout=PATIENCE_S)
    assert result.stdout.strip() == "[]"
