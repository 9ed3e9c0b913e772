"""Files to arrays, one module a kind of file; knows no data set."""
