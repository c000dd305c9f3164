"""Opens models: a name, a folder or a GGUF file to a PyTorch module with its tokenizer."""
