"""Shard a synthetic data set, and print [number of shards, number of newly written shards] as JSON.

Usage: `shard_driver.py FOLDER IMAGES FEW`. Up to FEW images, the shards are written in this process, otherwise by Ray
tasks.
"""

import json
import sys

from m2f.cluster.recipe.config import ClusterConfig
from m2f.cluster.sharding import job
from m2f.data_pipeline.config import DatasetConfig
from m2f.data_pipeline.sources import SyntheticSource
from m2f.data_pipeline.storage.storage import Storage

job.MAX_LOCAL_IMAGES = int(sys.argv[3])
dataset = DatasetConfig(shards=sys.argv[1], source=SyntheticSource(num_images=int(sys.argv[2])), shard_mb=0.05)
report = job.run_shard_job("train", dataset, ClusterConfig(shard_tasks=1), Storage())
sys.stdout.write(json.dumps([report.num_shards, report.written_shards]) + "\n")
