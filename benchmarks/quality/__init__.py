"""Judged comparisons: arms of a recipe, trained with several seeds, and tables of their differences."""
