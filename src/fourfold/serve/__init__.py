"""Chat and inference for people."""
