"""Chooses what to drop by what becomes of the model's answers. Importing this costs no PyTorch."""
