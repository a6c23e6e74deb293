"""Submit a run to a Ray cluster or to Kubernetes."""
