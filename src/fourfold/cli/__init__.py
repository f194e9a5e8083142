"""The command line: lazy dispatch and one file per verb."""
