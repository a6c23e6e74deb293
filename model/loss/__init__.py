"""Matching of queries to targets, point sampling and losses."""
