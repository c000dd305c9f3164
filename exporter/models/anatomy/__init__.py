"""Where a PyTorch model keeps its attentions, its MLPs and the residual stream."""
