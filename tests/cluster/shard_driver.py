"""Shards a synthetic data set: `shard_driver.py FOLDER IMAGES`; prints how many shards it has written."""

import json
import sys

from m2f.cluster.recipe.config import ClusterConfig
from m2f.cluster.sharding.job import run_shard_job
from m2f.data_pipeline.config import DatasetConfig
from m2f.data_pipeline.sources import SyntheticSource
from m2f.data_pipeline.storage.storage import Storage

dataset = DatasetConfig(shards=sys.argv[1], source=SyntheticSource(num_images=int(sys.argv[2])), shard_mb=0.05)
report = run_shard_job("train", dataset, ClusterConfig(shard_tasks=1), Storage())
sys.stdout.write(json.dumps([report.num_shards, report.written_shards]) + "\n")
