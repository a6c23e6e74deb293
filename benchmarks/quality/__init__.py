"""Comparisons of training methods: variants of a recipe (arms), trained with several seeds, and their differences."""
