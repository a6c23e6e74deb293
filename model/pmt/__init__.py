"""PMT: a plain mask transformer on the features of a vision transformer that stays frozen."""
