"""Data sets, file reading and views."""
