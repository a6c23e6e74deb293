"""Multiply-adds of a model: by formula for the official order of operations, and counted from what is executed."""
