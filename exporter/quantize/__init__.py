"""Weights in fewer bits, on top of the cut."""
