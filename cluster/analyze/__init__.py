"""Analyses of `m2f analyze`: size and speed of models, quality by decoder layer, and distribution of attention."""
