"""Operation counts, memory estimates and attention maps of a model."""
