"""Measured comparisons with plain baselines; each script prints a table and writes JSON."""
