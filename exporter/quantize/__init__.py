"""Weights in fewer bits, on top of the cut: what, how, and by whose quantiser."""
