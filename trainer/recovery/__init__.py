"""What changes a run after a failure: adjustments, bad samples, loss spikes."""
