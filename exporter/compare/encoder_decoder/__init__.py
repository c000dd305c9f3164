"""Compares two encoder-decoders, each a folder of three graphs."""

from exporter.compare.encoder_decoder.session import compare_stacks as compare_stacks
from exporter.compare.encoder_decoder.session import refuse_of_one_graph as refuse_of_one_graph
