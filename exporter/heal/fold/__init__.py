"""Folding: least squares whose result goes into weights that are there already."""
