"""The demo's trained video model, wan_shapes.safetensors, and the words of its prompts."""
