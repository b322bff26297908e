"""Tasks and training that several experiments share: one module each."""
