"""Tables and reports that compare the runs of MLflow and run folders, for `m2f compare`."""
