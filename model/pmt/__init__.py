"""PMT: a plain mask transformer on the features of a frozen vision transformer."""
