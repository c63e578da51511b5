"""The Triton implementation; importing it imports triton."""
