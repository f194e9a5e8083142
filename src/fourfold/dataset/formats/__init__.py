"""One file per dataset format; the file name is the value of formatting."""
