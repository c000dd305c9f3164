"""What runs a model: engines and how they are built, runners, decoders, and archives to ship.

An ONNX file comes in. An engine with the record of what it is goes out of ``build``; a runner of
``runners`` takes arrays and gives arrays, or a call to be timed, on any backend; ``decoding`` makes
text with a cache on top of either; ``packaging`` writes what other servers load.

A newcomer adds a backend in one file of ``runners`` and one row of
:mod:`exporter.engines.runners.registry`, which says how. What a runner can do it says in one
:class:`~exporter.engines.runners.base.Capabilities`; sessions of ONNX Runtime are made in
:mod:`exporter.engines.runners.sessions` alone, and what differs between TensorRT and TensorRT-RTX
stands in :mod:`exporter.engines.build.libraries`.
"""
