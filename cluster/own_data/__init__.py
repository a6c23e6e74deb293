"""Make a recipe from a folder of images and annotations, for `m2f init`."""
