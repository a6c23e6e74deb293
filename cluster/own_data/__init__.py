"""From a folder of images and annotations to a recipe."""
