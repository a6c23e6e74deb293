"""Open a trained model, to predict on images or to export it."""
