"""EoMT: queries inside the last blocks of a plain vision transformer."""
