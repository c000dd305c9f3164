"""GGUF file and plan in, GGUF file out, for llama.cpp. Needs neither PyTorch nor llama.cpp."""
