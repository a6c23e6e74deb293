"""Analyses of `m2f analyze`: tables of parameters and operations, and the attention of a trained model."""
