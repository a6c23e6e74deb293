"""What `import m2f` offers to Python programs: load, predict, train, evaluate, data sets from arrays."""
