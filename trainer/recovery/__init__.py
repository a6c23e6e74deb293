"""Changes to a run after a failure: adjustments, bad samples, loss spikes."""
