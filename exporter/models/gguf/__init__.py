"""What is read of GGUF files without llama.cpp: their headers, shards and facts."""
