"""Compares two encoder-decoders, each a folder of three graphs."""

from exporter.compare.encoder_decoder.session import compare_stacks as compare_stacks
