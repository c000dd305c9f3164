"""A card that is not there: CUDA's runtime and TensorRT's, as far as depthcut calls them.

The real ``Session``, ``Cuda``, runners and decoders run on it. It computes by ONNX Runtime, so the
answers are those of the graph, and it holds its user to what NVIDIA documents:

- CUDA: work on a stream runs when the stream is waited for, in its order, from memory as it is by
  then; nothing is allocated, freed or waited for while a stream is captured; an event is read once
  it has passed; a graph runs with the addresses and shapes that it was captured with.
- TensorRT: shapes are set before a run and lie inside the profile; every address is set and a
  multiple of 256; an output that is aliased with an input lies at its address, and no other two
  tensors overlap; one context holds a profile; a profile is chosen on the stream that runs, or
  waited for; a run comes before a capture, at the same shapes; an engine with host code is taken
  only where that is allowed.

What the library would answer with a code or with False, is answered so. What would be undefined
behaviour is a ``RuleError``. Time is virtual: the host's clock moves with each call, the device's
with its work. Times tell which calls were made, and nothing of any card.
"""
