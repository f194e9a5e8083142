"""One file per tracker; the file name is the value of report_to."""
