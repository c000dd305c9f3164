"""Compares two encoder-decoders, each a folder of three graphs."""

from exporter.compare.encoder_decoder.session import OF_ONE_GRAPH as OF_ONE_GRAPH
from exporter.compare.encoder_decoder.session import as_text as as_text
from exporter.compare.encoder_decoder.session import compare_stacks as compare_stacks
from exporter.compare.encoder_decoder.session import refuse_deciding as refuse_deciding
from exporter.compare.encoder_decoder.session import refuse_of_one_graph as refuse_of_one_graph
from exporter.compare.encoder_decoder.session import (
    refuse_of_other_source as refuse_of_other_source,
)
