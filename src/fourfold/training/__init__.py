"""The composition root, the loop, schedules, evaluation and hooks."""
