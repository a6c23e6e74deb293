"""Test that ranks and evaluation actors share GPUs. The GPUs are only declared to Ray, so the machine needs none."""

import pytest
import ray

from m2f.cluster.recipe.devices import RANK_SHARE
from tests.waiting import PATIENCE_S

pytestmark = [pytest.mark.cluster, pytest.mark.slow]
GPUS = 2


@pytest.fixture(scope="module")
def cluster():
    ray.init(
        "local",
        num_cpus=2 * GPUS,
        num_gpus=GPUS,
        object_store_memory=80 * 2**20,
        include_dashboard=False,
        log_to_driver=False,
    )
    yield
    ray.shutdown()


class GpuReporter:
    """Actor that returns the ids of the GPUs that Ray assigned to it."""

    def gpus(self):
        return ray.get_gpu_ids()


def test_ray_places_one_rank_and_one_actor_on_each_gpu(cluster):
    """The shares are those that `settle` assigns."""
    reporter = ray.remote(GpuReporter)
    ranks = [reporter.options(num_cpus=0, num_gpus=RANK_SHARE).remote() for _ in range(GPUS)]
    actors = [reporter.options(num_cpus=0, num_gpus=1 - RANK_SHARE).remote() for _ in range(GPUS)]
    rank_gpus = ray.get([rank.gpus.remote() for rank in ranks], timeout=PATIENCE_S)
    actor_gpus = ray.get([actor.gpus.remote() for actor in actors], timeout=PATIENCE_S)
    assert sorted(rank_gpus) == sorted(actor_gpus) == [[gpu] for gpu in range(GPUS)]
    for handle in (*ranks, *actors):
        ray.kill(handle)
