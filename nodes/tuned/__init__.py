"""Tuned parameters: the search, what it found, and files of that. Nothing here imports ComfyUI."""
