"""Own rewrites of ONNX graphs into the fused operators of a runtime, where no kept tool serves."""

from graph_passes.fusing.decoder import FusionReport, fuse_decoder

__all__ = ["FusionReport", "fuse_decoder"]
