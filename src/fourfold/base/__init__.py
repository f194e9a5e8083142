"""Errors, units, logging and the registry of open folders; imports nothing heavy, but for `peft`."""
