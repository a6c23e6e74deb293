"""Steps of the first minutes on a GPU; each step is a function that returns a JSON-serialisable result."""
