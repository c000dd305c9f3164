"""Text from a decoder, token by token, on any backend."""
