"""Tuned parameters: the search, what it found, and the file of it."""
