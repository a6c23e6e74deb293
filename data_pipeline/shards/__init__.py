"""Writing, verifying and describing WebDataset shards and their manifest."""
