"""One module per verb of `m2f`: SUMMARY, add_arguments(parser) and run(args). Heavy imports stay inside run.

`run` prints to standard output and returns the exit status of the process. A verb with sub-commands has them in KINDS.
"""
