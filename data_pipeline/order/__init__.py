"""The order of the samples of a run, as a pure function of the position."""
