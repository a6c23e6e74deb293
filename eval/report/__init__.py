"""Pages, pictures and files that show or pass on the results of an evaluation."""
