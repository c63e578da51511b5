"""Random calls, each drawn from one integer: `python -m comfyui_spargeattn.tests.fuzz --help`."""
