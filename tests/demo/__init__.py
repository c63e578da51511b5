"""A small trained Wan 2.1 text-to-video model and the demo that runs it dense and with SpargeAttn."""
