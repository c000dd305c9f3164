"""Models: folders to modules, where families keep attention and MLP, texts to tokens."""
