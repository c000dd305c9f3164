"""Texts to tokens, read downwards: this is the way of ``--calibration`` and of ``--eval-text``.

1. :mod:`~exporter.models.texts.sources`: what the user named becomes documents with a label and
   a hash.
2. :mod:`~exporter.models.texts.tokenizer`: the tokenizer, a loaded model's or that of a file.
3. :mod:`~exporter.models.texts.packing`: the documents' tokens become samples of equal length.
4. :mod:`~exporter.models.texts.calibration`: those three for a loaded model, or a text that it
   samples itself (:mod:`~exporter.models.texts.self_text`). For files,
   :mod:`exporter.compare.evaluation`.
5. :mod:`~exporter.models.texts.mixtures`: several of them as one.
"""
