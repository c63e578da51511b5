"""The ComfyUI nodes. The modules of this folder may import ComfyUI; those of its subfolders do not."""
