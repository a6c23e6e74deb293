"""Checks of a machine, a cluster and its services before a run, for `m2f doctor`."""
