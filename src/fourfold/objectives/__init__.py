"""One file per stage: what rows it needs and its loss."""
