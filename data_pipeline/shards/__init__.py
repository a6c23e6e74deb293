"""Writing, verification and description of WebDataset shards and their manifest."""
