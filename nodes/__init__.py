"""The ComfyUI nodes. The modules of this folder may import ComfyUI; those of its subfolders do not.

The subfolders import each other in one direction: report → run → call → tuned → kernels and hilbert.
"""
