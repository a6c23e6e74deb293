"""Metrics, phases, traces, rank statistics and the watchdog of a rank."""
