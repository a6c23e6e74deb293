"""Tables of parameters and operations, and the attention of a trained model, for `m2f analyze`."""
