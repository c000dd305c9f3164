"""What a graph holds: the residual stream, the branches that join it, and what belongs to each."""
