"""One sampling run: where it is, and what became of its calls."""
