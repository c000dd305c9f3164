"""Prints what an exported Whisper hears in recordings: transcribe.py FOLDER RECORDINGS."""

import sys
from pathlib import Path

from exporter.engines.decoding.encoder_decoder import EncoderDecoderRunner
from exporter.models.texts.pairs import PairReader, read_pairs

MOST = 3

folder = Path(sys.argv[1])
reader = PairReader.beside(folder)
pairs = read_pairs(sys.argv[2], part="evaluation", sound=reader.hears)
sources = reader.sources(pairs, MOST, part="evaluation")
with EncoderDecoderRunner(folder, threads=2) as runner:
    answers = runner.generate(sources.arrays, reader.rules, reader.answer_tokens)
for pair, answer in zip(pairs.pairs, answers, strict=False):
    print(f"{Path(pair.source).name}: {reader.text(answer)}")
