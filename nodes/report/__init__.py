"""A run or a search in words and pictures."""
