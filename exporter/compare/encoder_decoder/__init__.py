"""Compares two encoder-decoders, each a folder of three graphs."""
