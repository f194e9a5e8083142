"""What fits and what is fastest, said before the run."""
