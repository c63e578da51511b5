"""Random calls, each from one integer, held against the reference: `python -m comfyui_spargeattn.tests.fuzz --help`."""
