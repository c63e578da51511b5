"""The logger of the pack."""
import logging

log = logging.getLogger("comfyui_spargeattn")
