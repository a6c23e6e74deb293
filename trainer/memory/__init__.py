"""Estimates and probes of the memory that a micro-batch needs."""
