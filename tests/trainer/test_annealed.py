"""EoMT with mask annealing: random draws do not depend on restarts, the ZeRO stage or the number of ranks."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

STAGES = ("0", "1", "2", "3")


@pytest.fixture(scope="module")
def runs(launcher, training_shards):
    launcher.run_each([f"annealed:{stage}" for stage in STAGES])
    launcher.run_each([f"annealed_again:parts:{stage}" for stage in ("1", "3")], ranks=1)
    launcher.run_each([f"annealed_again:whole:{stage}" for stage in ("1", "3")])
    return launcher


def weights(runs, name: str, step: int) -> dict[str, torch.Tensor]:
    (file,) = runs.folder.glob(f"annealed_{name}/checkpoints/step_{step:08d}*/weights.safetensors")
    return load_file(file)


@pytest.mark.parametrize("stage", STAGES)
def test_resumed_run_is_bit_identical_to_an_uninterrupted_one(runs, stage):
    seen = runs.result(f"annealed:{stage}")
    resumed = {**seen["stopped"]["losses"], **seen["resumed"]["losses"]}
    assert resumed == seen["whole"]["losses"]
    whole, parts = weights(runs, f"whole{stage}", 5), weights(runs, f"parts{stage}", 5)
    assert all(torch.equal(tensor, parts[name]) for name, tensor in whole.items())
    # Mask probabilities of the fifth step (index 4): the blocks anneal over steps 0 to 5 and 1 to 7.
    probabilities = torch.tensor([(1 - 4 / 5) ** 0.9, (1 - 3 / 6) ** 0.9])
    torch.testing.assert_close(whole["transformer_decoder.attn_mask_probs"], probabilities)


@pytest.mark.parametrize("stage", STAGES[1:])
def test_every_stage_gives_the_same_losses(runs, stage):
    plain, sharded = (runs.result(f"annealed:{zero_stage}")["whole"]["losses"] for zero_stage in ("0", stage))
    assert list(sharded.values()) == pytest.approx(list(plain.values()), rel=1e-4)


@pytest.mark.parametrize("stage", ["1", "3"])
def test_number_of_ranks_does_not_change_the_random_draws(runs, stage):
    alone, together = (runs.result(f"annealed_again:{name}:{stage}")["losses"]["6"] for name in ("parts", "whole"))
    assert alone == pytest.approx(together, rel=1e-4)
