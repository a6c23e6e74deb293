"""Transformer decoders that turn queries and features into classes and mask embeddings."""
