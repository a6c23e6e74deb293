"""The verbs of `m2f`, one module each, with SUMMARY, EXAMPLE, add_arguments(parser) and run(args).

SUMMARY and EXAMPLE, a command line, are printed by `--help`. Heavy imports are inside `run`, so that the command line
starts quickly. `run` prints to standard output and returns the exit status of the process. A verb with subcommands
lists them in KINDS.
"""
