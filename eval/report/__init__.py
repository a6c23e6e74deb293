"""Pages, pictures and files that show or export the results of an evaluation."""
