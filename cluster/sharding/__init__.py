"""Write shards of raw data sets: small jobs in this process, others with Ray tasks."""
