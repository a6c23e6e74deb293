"""One module per verb of `m2f`: SUMMARY, add_arguments(parser) and run(args). Heavy imports stay inside run."""
