"""What the user sees: the metrics log, the live progress, the before/after samples and the HTML report of a run."""
