"""One file per stage: its loss."""
