"""Steps of the first minutes on a GPU: one function each, which returns what it found as JSON can hold it."""
