"""Every pixel decoder, transformer decoder and loss, and some backbones, under ZeRO-3 on two ranks.

The images of one rank contain no objects.
"""

import pytest

from tests.waiting import PATIENCE_S


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_sharded_step_of_every_member_of_the_family_equals_the_whole_one(launcher):
    launcher.run_successfully("family", timeout_s=4 * PATIENCE_S)
    for rank in (0, 1):
        for member, (whole, sharded) in launcher.result("family", rank).items():
            assert sharded["loss"] == pytest.approx(whole["loss"], rel=1e-5), member
            assert sharded["norm"] == pytest.approx(whole["norm"], rel=1e-4), member
