"""A run or a search in words and pictures. Nothing here imports ComfyUI."""
