"""GGUF file and plan in, GGUF file out, for llama.cpp. Needs neither PyTorch nor llama.cpp.

What stays of a file is copied byte for byte, in its quantised blocks. :mod:`exporter.models.gguf`
reads, ``writing.py`` writes, ``layers.py`` tells what goes, ``own_layers.py`` and ``deci.py`` say
which cuts llama.cpp computes right, ``surgery.py`` puts them together.
"""
