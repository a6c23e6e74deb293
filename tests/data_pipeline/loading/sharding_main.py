"""Shards a synthetic data set: `sharding_main.py FOLDER IMAGES`."""

import sys

from m2f.data_pipeline.config import DatasetConfig
from m2f.data_pipeline.readers import open_reader
from m2f.data_pipeline.shards.write import write_dataset
from m2f.data_pipeline.sources import SyntheticSource
from m2f.data_pipeline.storage.storage import Storage


def write_shards(folder, images):
    config = DatasetConfig(shards=str(folder), source=SyntheticSource(num_images=images, seed=8), shard_mb=0.05)
    return write_dataset(open_reader(config.source), config, Storage())


if __name__ == "__main__":
    write_shards(sys.argv[1], int(sys.argv[2]))
