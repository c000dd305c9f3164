"""The lines that load and run what was written, made from what its folder holds.

No library that they name is imported here; each of them is run by a test on a small model.
"""
