"""What becomes of a model's answers when branches are skipped or replaced, measured in PyTorch."""
