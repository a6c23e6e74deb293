"""The public Python API, as offered by `import m2f`: load, predict, train, evaluate, and data sets from arrays."""
