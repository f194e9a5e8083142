"""Files made from a run's figures: result summaries and loss curves."""
