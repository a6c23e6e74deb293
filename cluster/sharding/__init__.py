"""From raw data sets to shards: in this process where there is little to do, else as Ray tasks."""
