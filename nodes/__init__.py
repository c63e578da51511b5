"""The ComfyUI nodes: the only part of the package that knows ComfyUI."""
