"""Tools that run once before training: lists, caches, checks."""
