"""One file per optimizer; the file name is the value of optim."""
