"""The mesh, the step and everything that splits the work."""
