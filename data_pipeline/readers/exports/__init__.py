"""Readers of the export formats of labelling tools."""
