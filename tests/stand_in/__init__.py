"""A card that is not there: CUDA's runtime and TensorRT's, as far as depthcut calls them."""
