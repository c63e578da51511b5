"""`sparge_attention` inside other libraries: a module for each, which imports its library only when asked."""
