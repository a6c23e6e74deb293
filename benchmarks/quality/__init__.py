"""Comparison of training methods: train variants of a recipe (arms) with several seeds and judge their differences."""
