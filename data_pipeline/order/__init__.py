"""The order of a run's samples, a pure function of the position."""
