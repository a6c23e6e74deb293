"""A user's program in which a strict type checker finds the errors that the comments mark. It is checked, not run."""

import m2f

m2f.lod("runs/demo")  # error
m2f.load("runs/demo", device=3)  # error
m2f.load("runs/demo").predict(3)  # error
