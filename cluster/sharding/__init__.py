"""Write the shards of raw data sets, in this process for small jobs, else with Ray tasks."""
