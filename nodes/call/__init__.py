"""One attention call: its arguments, its layer, its tokens, and what becomes of it."""
